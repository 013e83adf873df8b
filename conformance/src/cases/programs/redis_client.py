# Clients of a redis server that is in the tree: each sends many requests before it reads the answers, so that some are on
# their way at any time. Every answer is checked.
import os
import socket
import sys
import time
import traceback

CLIENTS = 3
ADDRESS = ('127.0.0.1', 6379)


def connect():
    deadline = time.monotonic() + 60
    while True:
        try:
            return socket.create_connection(ADDRESS)
        except ConnectionRefusedError:
            assert time.monotonic() < deadline, 'redis does not listen'
            time.sleep(0.01)


def request(*words):
    parts = [b'*%d\r\n' % len(words)]
    for word in words:
        parts.append(b'$%d\r\n%s\r\n' % (len(word), word))
    return b''.join(parts)


class Answers:
    def __init__(self, connection):
        self.file = connection.makefile('rb')

    def next(self):
        line = self.file.readline()
        assert line.endswith(b'\r\n'), f'the connection ended with {line!r}'
        if line[:1] == b'$':
            body = self.file.read(int(line[1:]) + 2)
            return body[:-2]
        return line[:-2]


def work(number):
    """Counts, and keeps values, until the file `go` is there: each answer follows from how often it was asked."""
    connection = connect()
    answers = Answers(connection)
    addresses = connection.getsockname(), connection.getpeername()
    name = b'%d' % number
    count = 0
    while not os.path.exists('go'):
        value = b'%d-%d-' % (number, count) * 200
        connection.sendall(b''.join(
            request(b'INCR', b'count' + name) + request(b'SET', b'value' + name, value) + request(b'GET', b'value' + name)
            for _ in range(20)))
        for _ in range(20):
            count += 1
            answer = answers.next()
            assert answer == b':%d' % count, f'counting to {count} gave {answer}'
            answer = answers.next()
            assert answer == b'+OK', f'SET gave {answer}'
            answer = answers.next()
            assert answer == value, f'{len(answer)} bytes instead of {len(value)}'
        # So that there is a processor for the others.
        time.sleep(0.002)
        if count == 100 and number:
            os.mkdir(f'begun{number}')
        # From here on nothing changes but what is on its way. No descriptor is open for these signs.
        if not number and not os.path.exists('ready') and all(os.path.exists(f'begun{n}') for n in range(1, CLIENTS)):
            os.mknod('ready')
    assert addresses == (connection.getsockname(), connection.getpeername())
    connection.sendall(request(b'INCRBY', b'all', b'%d' % count))
    answers.next()
    return count


def child(number):
    pid = os.fork()
    if pid == 0:
        try:
            work(number)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return pid


children = [child(number) for number in range(1, CLIENTS)]
try:
    work(0)
    for pid in children:
        assert os.waitpid(pid, 0)[1] == 0, 'a client failed'
    last = connect()
    answers = Answers(last)
    last.sendall(request(b'GET', b'all') + request(b'MGET', *[b'count%d' % number for number in range(CLIENTS)]))
    total = int(answers.next())
    assert answers.next() == b'*%d' % CLIENTS
    counted = sum(int(answers.next()) for _ in range(CLIENTS))
    assert total == counted > 0, f'{total} requests were counted as {counted}'
    last.sendall(request(b'SHUTDOWN', b'NOSAVE'))
except BaseException:
    traceback.print_exc()
    sys.exit(1)
with open('verdict', 'w') as verdict:
    verdict.write('pass\n')
