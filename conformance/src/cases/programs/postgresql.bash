# A PostgreSQL cluster with clients, all of it in the tree: a transaction is open, and another client has it compute.
# As an ordinary user, as the server wants it.
set -o pipefail
if [ "$(id -u)" = 0 ]; then
    exec setpriv --reuid=65534 --regid=65534 --clear-groups /bin/bash "$PWD/postgresql.bash"
fi
bin=$(echo /usr/lib/postgresql/*/bin)
export PGHOST=$PWD PGPORT=54321 PGDATABASE=postgres PGUSER=tester HOME=$PWD LC_ALL=C

fail() {
    echo "$1" > verdict
    tail -n 20 server.log
    "$bin/pg_ctl" -D data -m immediate stop > /dev/null
    exit 1
}

"$bin/initdb" --no-sync --username=tester --auth=trust --locale=C -D data > initdb.log || fail "initdb failed"
"$bin/postgres" -D data -k "$PWD" -p "$PGPORT" -c listen_addresses= -c fsync=off -c autovacuum=off -c max_logical_replication_workers=0 -c checkpoint_timeout=1h -c max_connections=10 \
    -c shared_buffers=16MB -c shared_memory_type=sysv -c jit=off \
    -c wal_level=minimal -c max_wal_senders=0 > server.log 2>&1 &
server=$!
for ((tries = 0; tries < 1000; tries++)); do
    "$bin/psql" -qAtc 'select 1' > /dev/null 2>&1 && break
    sleep 0.02
done
"$bin/psql" -qAtc 'create table numbers (number int primary key, text text); create table kept (steps int, digest text);
    create table stop (number int)' ||
    fail "the tables were not made"

# Reads its statements from a pipe, and answers into another: its transaction stays open.
coproc session { "$bin/psql" -qAt 2>&1; }
ask() {
    echo "$1" >&"${session[1]}"
    read -r -t 120 -u "${session[0]}" answer || fail "no answer to: $1"
    [ "$answer" = "$2" ] || fail "to $1 the answer was $answer, and $2 was expected"
}
echo 'begin;' >&"${session[1]}"
echo "insert into numbers select n, repeat(md5(n::text), 20) from generate_series(1, 20000) n;" >&"${session[1]}"
ask 'select count(*) from numbers;' 20000

# Another client has the server compute, a digest of a digest and so on, until it is told to stop: in one transaction, so that
# nothing is written meanwhile, and the server stays with its file of the log.
"$bin/psql" -qAt -c "do \$\$ declare steps int := 0; digest text := 'begin'; begin
    while not exists (select from stop) loop
        steps := steps + 1;
        digest := md5(digest);
    end loop;
    insert into kept values (steps, digest);
end \$\$" > computing.log 2>&1 &
computing=$!
is_busy="select count(*) from pg_stat_activity where state = 'active' and query like 'do %'"
until [ "$("$bin/psql" -qAtc "$is_busy")" = 1 ]; do sleep 0.01; done
# Checkpointer, writers, and the servers of two clients: nobody comes or goes any more.
until [ "$(wc -w < "/proc/$server/task/$server/children")" = 5 ]; do sleep 0.01; done
# What was written is on the disk: no writer opens a file of the log while it is looked at.
"$bin/psql" -qAtc checkpoint > /dev/null || fail "no checkpoint"
until [ "$(wc -w < "/proc/$server/task/$server/children")" = 5 ]; do sleep 0.01; done
# Without a child, which would be in the tree for a moment.
mkfifo silence
exec 9<> silence
: > ready
until [ -e go ]; do read -r -t 0.01 -u 9; done

[ "$("$bin/psql" -qAtc 'select count(*) from numbers')" = 0 ] || fail "the open transaction is seen by others"
ask 'select count(*), sum(number) from numbers;' '20000|200010000'
echo 'savepoint half; delete from numbers where number > 10000;' >&"${session[1]}"
ask 'select count(*) from numbers;' 10000
echo 'rollback to half; commit;' >&"${session[1]}"
ask 'select 7;' 7
wrong="select count(*) from numbers where text <> repeat(md5(number::text), 20)"
[ "$("$bin/psql" -qAtc "$wrong")" = 0 ] || fail "rows of the transaction are wrong"
[ "$("$bin/psql" -qAtc 'select count(*) from numbers')" = 20000 ] || fail "the transaction is not there"
[ "$("$bin/psql" -qAtc "$is_busy")" = 1 ] || fail "the server computes no more: $(cat computing.log)"
"$bin/psql" -qAtc 'insert into stop values (1)' || fail "the computing client cannot be stopped"
wait "$computing" || fail "the computing client ended with $?: $(cat computing.log)"
again="with recursive chain(step, digest) as (select 0, 'begin' union all
    select step + 1, md5(chain.digest) from chain, kept where step < steps)
    select count(*) from chain join kept on step = steps and chain.digest = kept.digest and steps > 0"
[ "$("$bin/psql" -qAtc "$again")" = 1 ] || fail "what the server computed is wrong"
eval "exec ${session[1]}>&-"
"$bin/pg_ctl" -D data -m fast -w stop > /dev/null || fail "the server does not stop"
wait "$server" || fail "the server ended with $?"
echo pass > verdict
