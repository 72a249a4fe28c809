# Renders all templates of a job as BOSH does: what its documentation says of `p`, `if_p`, `link`, `if_link` and `spec`.
#
# A request a line on standard input, JSON: {"job": FOLDER, "properties": {...}, "links": {NAME: {"properties": {...}, "instances": [...]}},
# "spec": {...}}. Its answer, a line on standard output: {"files": {DESTINATION: TEXT}, "errors": {DESTINATION: MESSAGE}}.

require 'erb'
require 'json'
require 'ostruct'
require 'yaml'

class UnknownProperty < StandardError
  def initialize(names)
    super("Can't find property '#{names.join("', or '")}'")
  end
end

class UnknownLink < StandardError
  def initialize(name)
    super("Can't find link '#{name}'")
  end
end

# What a conditional returns: `.else { }`, `.else_if_p(...) { }`, `.else_if_link(...) { }`.
Done = Struct.new(:context) do
  def else; end

  def else_if_p(*) = self

  def else_if_link(*) = self
end

Missed = Struct.new(:context) do
  def else = yield

  def else_if_p(*names, &block) = context.if_p(*names, &block)

  def else_if_link(name, &block) = context.if_link(name, &block)
end

def struct(value)
  case value
  when Hash then OpenStruct.new(value.transform_values { |each| struct(each) })
  when Array then value.map { |each| struct(each) }
  else value
  end
end

module Properties
  def p(*arguments)
    names = Array(arguments[0])
    names.each do |name|
      found = find(name)
      return found unless found.nil?
    end
    return arguments[1] if arguments.size == 2

    raise UnknownProperty, names
  end

  def if_p(*names)
    values = names.map { |name| find(name) }
    return Missed.new(self) if values.any?(&:nil?)

    yield(*values)
    Done.new(self)
  end

  def find(name)
    name.split('.').reduce(@properties) { |found, key| found.is_a?(Hash) ? found[key] : nil }
  end
end

class Link
  include Properties
  attr_reader :instances, :address

  def initialize(content)
    @properties = content.fetch('properties')
    @instances = struct(content.fetch('instances'))
    @address = content['address']
  end
end

class Context
  include Properties
  attr_reader :spec, :properties

  def initialize(properties, links, spec)
    @properties = properties
    @links = links.transform_values { |each| Link.new(each) }
    @spec = struct(spec)
  end

  def link(name) = @links[name] || raise(UnknownLink, name)

  def if_link(name)
    return Missed.new(self) unless @links.key?(name)

    yield link(name)
    Done.new(self)
  end

  def name = spec.name

  def index = spec.index

  def bind = binding
end

# What a job sees: what its spec declares, with the defaults there; nothing else that the manifest has.
def declared(spec, given)
  spec.fetch('properties', {}).each_with_object({}) do |(name, about), result|
    *folders, last = name.split('.')
    value = name.split('.').reduce(given) { |found, key| found.is_a?(Hash) ? found[key] : nil }
    value = about['default'] if value.nil?
    folders.reduce(result) { |folder, key| folder[key] ||= {} }[last] = value
  end
end

def render(request)
  folder = request.fetch('job')
  spec = YAML.safe_load(File.read("#{folder}/spec"))
  context = Context.new(declared(spec, request.fetch('properties')), request.fetch('links'), request.fetch('spec'))
  files = {}
  errors = {}
  templates = spec.fetch('templates').map { |source, target| ["templates/#{source}", target] }
  templates.push(%w[monit monit]).each do |source, target|
    template = ERB.new(File.read("#{folder}/#{source}"), trim_mode: '-')
    template.filename = source
    files[target] = template.result(context.bind)
  rescue StandardError, ScriptError => error
    errors[target] = error.message
  end
  { 'files' => files, 'errors' => errors }
end

$stdout.sync = true
$stdin.each_line { |line| puts JSON.generate(render(JSON.parse(line))) }
