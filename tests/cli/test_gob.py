"""gob, byte for byte: against what cf CLI 7.3 and a plugin in Go said to each other, and contract/policy.md 7.3."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.plugin import gob
from cli.plugin.gob import BOOL, INT, STRING, UINT, BadGob, Decoder, Encoder, Map, Slice, Struct
from cli.plugin.rpc import METADATA, REQUEST, STRINGS, USAGE, VERSION

RECORDING = Path(__file__).parent / "data" / "cf-plugin-rpc.jsonl"
RESPONSE = Struct("Response", (("ServiceMethod", STRING), ("Seq", UINT), ("Error", STRING)))
EMPTY = Struct("", ())
ARGUMENTS: dict[str, gob.Type] = {
    "SetPluginMetadata": METADATA,
    "CallCoreCommand": STRINGS,
    "DisableTerminalOutput": BOOL,
    "GetOutputAndReset": BOOL,
}


def recorded(direction: str) -> list[bytes]:
    """What was sent on each connection, in this direction."""
    run, found = 0, dict[tuple[int, int], bytes]()
    for line in RECORDING.read_text().splitlines():
        record = json.loads(line)
        run += record["ev"] == "exec"
        if record["ev"] == "data" and record["dir"] == direction:
            key = run, record["conn"]
            found[key] = found.get(key, b"") + bytes.fromhex(record["hex"])
    return list(found.values())


def source(content: bytes) -> Callable[[int], bytes]:
    at = 0

    def take(count: int) -> bytes:
        nonlocal at
        if at + count > len(content):
            raise EOFError
        at += count
        return content[at - count : at]

    return take


def decoded(content: bytes) -> list[Any]:
    """Every value of a stream that ends with one."""
    taken = 0
    take = source(content)

    def counting(count: int) -> bytes:
        nonlocal taken
        found = take(count)
        taken += count
        return found

    decoder, values = Decoder(counting), list[Any]()
    while taken < len(content):
        values.append(decoder.decode())
    return values


def test_all_that_a_plugin_in_go_sent_we_would_send() -> None:
    streams = recorded("plugin->cf")
    assert len(streams) == 24
    for stream in streams:
        values, encoder, again = decoded(stream), Encoder(), b""
        for request, argument in zip(values[::2], values[1::2], strict=True):
            kind = ARGUMENTS.get(request["ServiceMethod"].removeprefix("CliRpcCmd."), STRING)
            again += encoder.encode(REQUEST, request) + encoder.encode(kind, argument)
        assert again.hex() == stream.hex()


def test_all_that_cf_answered_is_understood() -> None:
    streams = [decoded(stream) for stream in recorded("cf->plugin")]
    values = {answer["ServiceMethod"]: (answer, value) for stream in streams for answer, value in pairs(stream)}
    assert {
        name.removeprefix("CliRpcCmd."): value for name, (_, value) in values.items() if name[10:15] == "GetCu"
    } == {
        "GetCurrentSpace": {"SpaceFields": {"Guid": "space-guid-1", "Name": "dev"}},
        "GetCurrentOrg": {"OrganizationFields": {"Guid": "org-guid-1", "Name": "myorg", "QuotaDefinition": {}}},
    }
    assert values["CliRpcCmd.AccessToken"][1].startswith("bearer ey")
    assert values["CliRpcCmd.IsLoggedIn"][1] is True
    answer, body = values["CliRpcCmd.GetApp"]
    assert answer["Error"] == "Server error, status code: 404, error code: 0, message: "
    assert body == {}
    assert streams[9][5][:2] == ["{", '   "total_policies": 1,']


def pairs(values: list[Any]) -> list[tuple[Any, Any]]:
    return list(zip(values[::2], values[1::2], strict=True))


def call(method: str) -> dict[str, str]:
    return {"ServiceMethod": f"CliRpcCmd.{method}"}


def primed(kind: Struct, first_id: int) -> Encoder:
    """An encoder that has sent a request or answer: the next type has the number `first_id`."""
    encoder = Encoder(first_id - 1)
    encoder.encode(kind, {})
    return encoder


SPACE = Struct("Space", (("SpaceFields", Struct("SpaceFields", (("Guid", STRING), ("Name", STRING)))),))
OLD_METADATA = Struct(
    "PluginMetadata",
    (*METADATA.fields[:4], ("Commands", Slice("[]main.Command", METADATA.fields[4][1].element))),
)
ALLOW = {"Usage": "u", "Options": {"-port": "p"}}


@pytest.mark.parametrize(
    ("encoder", "kind", "value", "vector"),
    [
        (
            Encoder(64),
            REQUEST,
            call("IsMinCliVersion"),
            "2e7f030101075265717565737401ff80000102010d536572766963654d6574686f64010c0001035365710106000000"
            "1eff800119436c69527063436d642e49734d696e436c6956657273696f6e00",
        ),
        (Encoder(), STRING, "6.15.0", "090c0006362e31352e30"),
        (
            Encoder(65),
            RESPONSE,
            call("IsMinCliVersion"),
            "3aff8103010108526573706f6e736501ff82000103010d536572766963654d6574686f64010c00010353657101060001054572726f"
            "72010c0000001eff820119436c69527063436d642e49734d696e436c6956657273696f6e00",
        ),
        (Encoder(), BOOL, True, "03020001"),
        (Encoder(), BOOL, False, "03020000"),
        (Encoder(), STRING, "", "030c0000"),
        (Encoder(), STRING, "https://api.x", "100c000d68747470733a2f2f6170692e78"),
        (
            primed(REQUEST, 66),
            STRINGS,
            ["curl", "/v3/apps"],
            "0cff85020102ff8600010c000012ff860002046375726c082f76332f61707073".replace("85", "83").replace("86", "84"),
        ),
        (
            Encoder(67),
            STRINGS,
            ["curl", "/v3/apps"],
            "0cff85020102ff8600010c000012ff860002046375726c082f76332f61707073",
        ),
        (Encoder(66), EMPTY, {}, "0aff83030102ff8400000003ff8400"),
        (
            Encoder(68),
            SPACE,
            {"SpaceFields": {"Guid": "sg", "Name": "sn"}},
            "24ff8703010105537061636501ff88000101010b53706163654669656c647301ff8a000000"
            "2bff890301010b53706163654669656c647301ff8a000102010447756964010c0001044e616d65010c000000"
            "0dff8801010273670102736e0000",
        ),
        (
            Encoder(74),
            OLD_METADATA,
            {
                "Name": "network-policy",
                "Version": {"Major": 1, "Minor": 6, "Build": 1},
                "LibraryVersion": {},
                "MinCliVersion": {"Major": 6, "Minor": 15},
                "Commands": [{"Name": "allow-access", "HelpText": "h", "UsageDetails": ALLOW}],
            },
            "67ff930301010e506c7567696e4d6574616461746101ff9400010501044e616d65010c00010756657273696f6e01ff9600010e4c696272"
            "61727956657273696f6e01ff9600010d4d696e436c6956657273696f6e01ff96000108436f6d6d616e647301ff9e000000"
            "37ff950301010b56657273696f6e5479706501ff9600010301054d616a6f7201040001054d696e6f7201040001054275696c64010400"
            "0000"
            "1dff9d0201010e5b5d6d61696e2e436f6d6d616e6401ff9e0001ff980000"
            "47ff9703010107436f6d6d616e6401ff9800010401044e616d65010c000105416c696173010c00010848656c7054657874010c00010c"
            "557361676544657461696c7301ff9a000000"
            "2aff9903010105557361676501ff9a00010201055573616765010c0001074f7074696f6e7301ff9c000000"
            "21ff9b040101116d61705b737472696e675d737472696e6701ff9c00010c010c0000"
            "46ff94010e6e6574776f726b2d706f6c696379010102010c010200010001010c011e000101010c616c6c6f772d616363657373020168"
            "010101750101052d706f72740170000000",
        ),
    ],
    ids=lambda value: value[:16] if isinstance(value, str) else None,
)
def test_the_vectors_of_go(encoder: Encoder, kind: gob.Type, value: Any, vector: str) -> None:
    assert encoder.encode(kind, value).hex() == vector
    assert decoded(bytes.fromhex(vector)) == [value]


def test_numbers() -> None:
    assert [gob.uint(number).hex() for number in (0, 7, 127, 128, 256, 2**64 - 1)] == [
        "00",
        "07",
        "7f",
        "ff80",
        "fe0100",
        "f8ffffffffffffffff",
    ]
    assert [gob.integer(number).hex() for number in (0, -1, 1, 64, -65, -(2**63))] == [
        "00",
        "01",
        "02",
        "ff80",
        "ff81",
        "f8ffffffffffffffff",
    ]
    # The example of the package's documentation.
    assert Encoder().encode(gob.FLOAT, 17.0).hex() == "050800fe3140"


NAMES = st.text("abcXYZ", min_size=1, max_size=5)
KINDS: st.SearchStrategy[gob.Type] = st.recursive(
    st.sampled_from([BOOL, INT, UINT, gob.FLOAT, gob.BYTES, STRING]),
    lambda inner: st.one_of(
        st.builds(Slice, NAMES, inner),
        st.builds(Map, NAMES, st.sampled_from([INT, STRING]), inner),
        st.builds(
            lambda name, fields: Struct(name, tuple(fields.items())), NAMES, st.dictionaries(NAMES, inner, max_size=4)
        ),
    ),
    max_leaves=8,
)


def values(kind: gob.Type) -> st.SearchStrategy[Any]:
    """Values as they come back: without fields that are zero."""
    match kind:
        case Slice():
            return st.lists(values(kind.element), max_size=4)
        case Map():
            return st.dictionaries(values(kind.key), values(kind.element), max_size=4)
        case Struct():
            fields = st.fixed_dictionaries({name: values(field) for name, field in kind.fields})
            structs = {name for name, field in kind.fields if isinstance(field, Struct)}
            return fields.map(lambda value: {name: item for name, item in value.items() if item or name in structs})
    return {
        BOOL: st.booleans(),
        INT: st.integers(-(2**63), 2**63 - 1),
        UINT: st.integers(0, 2**64 - 1),
        gob.FLOAT: st.floats(allow_nan=False),
        gob.BYTES: st.binary(max_size=20),
        STRING: st.text(max_size=20),
    }[kind]


@given(st.data())
def test_what_is_encoded_comes_back(data: st.DataObject) -> None:
    encoder, stream, sent = Encoder(), b"", []
    for kind in data.draw(st.lists(KINDS, min_size=1, max_size=3)):
        value = data.draw(values(kind))
        stream += encoder.encode(kind, value)
        sent.append(value)
    assert decoded(stream) == sent


STREAMS = [stream for direction in ("plugin->cf", "cf->plugin") for stream in recorded(direction)]


@given(st.sampled_from(STREAMS), st.data())
def test_nothing_received_does_more_harm_than_an_error(stream: bytes, data: st.DataObject) -> None:
    damaged = bytearray(stream)
    for at in data.draw(st.lists(st.integers(0, len(stream) - 1), max_size=4)):
        damaged[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(stream)))
    with contextlib.suppress(BadGob, EOFError):
        decoded(bytes(damaged[:cut]))


@pytest.mark.parametrize(
    ("stream", "text"),
    [
        ("fc7fffffff", "a message of 2147483647 bytes"),
        ("f0", "a number of 16 bytes"),
        ("03ff8400", "a type that is not, or badly, defined"),
        ("030c0005", "5 bytes announced, and 0 left"),
        ("030c0105", "must begin with a zero"),
        ("0cff85020102ff8600010c000005ff86006400", "100 items announced, and 1 bytes left"),
    ],
)
def test_what_is_wrong_with_a_stream_is_said(stream: str, text: str) -> None:
    with pytest.raises(BadGob, match=text):
        decoded(bytes.fromhex(stream))


def test_values_of_types_unknown_to_us() -> None:
    """An interface, which carries its type's name; a type that encodes itself; an array."""
    # Its own zero; the name `string`; that type's number; the length of what is within: a zero, a length, `hi`.
    content = bytes.fromhex("00" + "06737472696e67" + "0c" + "04" + "00026869")
    assert decoded(gob._message(gob.INTERFACE.id, content)) == ["hi"]
    assert decoded(gob._message(gob.INTERFACE.id, b"\0\0")) == [None]
    own = Encoder(70)
    definition = own._value(gob._DEFINITION, {"GobEncoderT": {"CommonType": {"Name": "Time", "Id": 70}}})
    stream = gob._message(-70, definition) + gob._message(70, b"\0" + b"\x03abc")
    assert decoded(stream) == [b"abc"]
    array = {"ArrayT": {"CommonType": {"Name": "A", "Id": 71}, "Elem": INT.id, "Len": 2}}
    stream = gob._message(-71, own._value(gob._DEFINITION, array)) + gob._message(71, b"\0\x02\x02\x04")
    assert decoded(stream) == [[1, 2]]


def test_a_struct_in_another_order_and_with_more_fields() -> None:
    more = Struct("Usage", (("New", Slice("", VERSION)), ("Options", dict(USAGE.fields)["Options"]), ("Usage", STRING)))
    value = {"New": [{"Major": 1}], "Options": {"a": "b"}, "Usage": "u"}
    assert decoded(Encoder().encode(more, value)) == [value]
