# Threads that compute and talk, a file being written, and a database in the middle of a transaction; all of it is checked
# at the end.
import hashlib
import os
import queue
import sqlite3
import subprocess
import sys
import threading
import time
import traceback

stop = threading.Event()
failures = []


def checked(work):
    def run(*arguments):
        try:
            work(*arguments)
        except BaseException:
            failures.append(traceback.format_exc())
    return run


@checked
def chain(number, steps):
    """A chain of digests: any lost or doubled step gives another end."""
    digest = number.to_bytes(8, 'big')
    while not stop.is_set():
        digest = hashlib.sha256(digest).digest()
        steps[number] += 1
        time.sleep(0.0002)
    again = number.to_bytes(8, 'big')
    for _ in range(steps[number]):
        again = hashlib.sha256(again).digest()
    assert again == digest, f'chain {number} went wrong within {steps[number]} steps'


@checked
def produce(numbers):
    number = 0
    while not stop.is_set():
        numbers.put(number)
        number += 1
    numbers.put(None)


@checked
def consume(numbers, counts):
    expected = 0
    while (number := numbers.get()) is not None:
        assert number == expected, f'{number} came out of the queue instead of {expected}'
        expected += 1
        counts['consumed'] = expected


@checked
def write(file, counts):
    while not stop.is_set():
        file.write(f'line {counts["written"]}\n')
        counts['written'] += 1
        time.sleep(0.0005)


def others_can_write():
    """Whether another process gets the database's write lock: not as long as our transaction holds it."""
    code = "import sqlite3; sqlite3.connect('state.db', timeout=0, isolation_level=None).execute('begin immediate')"
    other = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert other.returncode == 0 or 'database is locked' in other.stderr, other.stderr
    return other.returncode == 0


def main():
    counts = {'written': 0, 'consumed': 0}
    steps = [0] * 4
    numbers = queue.Queue(maxsize=100)
    file = open('lines.txt', 'w')
    database = sqlite3.connect('state.db', isolation_level=None)
    database.execute('pragma journal_mode = delete')
    database.execute('create table squares (number integer primary key, square integer)')
    database.execute('begin immediate')
    database.executemany('insert into squares values (?, ?)', ((n, n * n) for n in range(5000)))
    assert not others_can_write()

    threads = [threading.Thread(target=chain, args=(number, steps)) for number in range(len(steps))]
    threads.append(threading.Thread(target=produce, args=(numbers,)))
    threads.append(threading.Thread(target=consume, args=(numbers, counts)))
    threads.append(threading.Thread(target=write, args=(file, counts)))
    for thread in threads:
        thread.start()
    before = 0
    while not os.path.exists('go'):
        if before == 0 and min(steps) > 100 and counts['written'] > 100 and counts['consumed'] > 100:
            before = counts['written']
            open('ready', 'w').close()
        time.sleep(0.001)

    deadline = time.monotonic() + 30
    mark = (list(steps), dict(counts))
    while not (all(new > old for new, old in zip(steps, mark[0])) and all(counts[key] > mark[1][key] for key in counts)):
        assert not failures and time.monotonic() < deadline, f'threads stand still: {mark} {steps} {counts}'
        time.sleep(0.001)
    stop.set()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), f'{thread.name} does not end'
    file.close()
    with open('lines.txt') as lines:
        assert lines.read() == ''.join(f'line {n}\n' for n in range(counts['written'])), 'the file is not what was written'

    assert database.in_transaction, 'the transaction is gone'
    assert not others_can_write(), 'the lock of the transaction is gone'
    database.executemany('insert into squares values (?, ?)', ((n, n * n) for n in range(5000, 10000)))
    database.execute('commit')
    assert others_can_write()
    with sqlite3.connect('state.db') as again:
        assert again.execute('pragma integrity_check').fetchone() == ('ok',)
        count, wrong = again.execute('select count(*), sum(square <> number * number) from squares').fetchone()
        assert (count, wrong) == (10000, 0), (count, wrong)
    assert not failures, '\n'.join(failures)


try:
    main()
    verdict = 'pass'
except BaseException:
    stop.set()
    verdict = traceback.format_exc()
with open('verdict', 'w') as out:
    out.write(verdict)
os._exit(0 if verdict == 'pass' else 1)
