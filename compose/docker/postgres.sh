#!/bin/bash
# PostgreSQL with a database and a role for each of our services: TLS only, passwords from files of /secrets.
set -euo pipefail
bin=$(echo /usr/lib/postgresql/*/bin)
data=/var/lib/silkbus/postgres/cluster
secrets=/secrets

if [ ! -d "$data" ]; then
  # Made aside and renamed when it is whole: what was interrupted begins anew.
  new=$data.new
  rm -rf "$new"
  "$bin/initdb" --pgdata="$new" --username=silkbus --encoding=UTF8 --locale=C.UTF-8 \
    --auth-local=peer --auth-host=scram-sha-256 >/dev/null
  for name in policy silk; do
    echo "CREATE ROLE $name LOGIN PASSWORD '$(cat "$secrets/$name.password")';"
    echo "CREATE DATABASE $name OWNER $name;"
    echo "REVOKE ALL ON DATABASE $name FROM PUBLIC;"
  done | "$bin/postgres" --single -D "$new" postgres >/dev/null
  printf '%s\n' 'local   all    silkbus      peer' \
    'hostssl policy policy all scram-sha-256' 'hostssl silk silk all scram-sha-256' >"$new/pg_hba.conf"
  sync
  mv "$new" "$data"
fi

exec "$bin/postgres" -D "$data" -c listen_addresses='*' -c unix_socket_directories=/tmp \
  -c ssl=on -c ssl_cert_file="$secrets/server.crt" -c ssl_key_file="$secrets/server.key"
