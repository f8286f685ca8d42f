"""Passes TCP connections on to a server that seems far away: distance.py SERVER_PORT DELAY_MS

Prints the port that it listens on. Bytes to the server, the first of a connection included, go on DELAY_MS later, so each
request takes that much longer; answers pass at once, through the kernel alone, so bandwidth stays and the CPU is left to
those who are measured. Ends with its standard input.
"""

import fcntl
import os
import queue
import socket
import sys
import threading
import time

STEP = 1 << 20


def late(client, server, delay):
    """What the client says, later; a pause in it delays nothing else."""
    waiting = queue.SimpleQueue()

    def listen():
        try:
            while said := client.recv(1 << 16):
                waiting.put((time.monotonic() + delay, said))
        except OSError:
            pass
        waiting.put((0, b""))

    threading.Thread(target=listen, daemon=True).start()
    try:
        while True:
            due, said = waiting.get()
            if not said:
                break
            time.sleep(max(0, due - time.monotonic()))
            server.sendall(said)
        server.shutdown(socket.SHUT_WR)
    except OSError:
        pass


def at_once(server, client):
    inside, outside = os.pipe()
    try:
        # A pipe of the usual 64 KiB would have this run, and compete for the cores, sixteen times as often.
        fcntl.fcntl(outside, fcntl.F_SETPIPE_SZ, STEP)
        while count := os.splice(server.fileno(), outside, STEP):
            while count:
                count -= os.splice(inside, client.fileno(), count)
        client.shutdown(socket.SHUT_WR)
    except OSError:
        pass
    finally:
        os.close(inside)
        os.close(outside)


def carry(client, port, delay):
    with client, socket.create_connection(("127.0.0.1", port)) as server:
        for end in (client, server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        answers = threading.Thread(target=at_once, args=(server, client), daemon=True)
        answers.start()
        late(client, server, delay)
        answers.join()


def accept(listener, port, delay):
    while True:
        client, _ = listener.accept()
        threading.Thread(target=carry, args=(client, port, delay), daemon=True).start()


def main():
    port, delay = int(sys.argv[1]), int(sys.argv[2]) / 1000
    listener = socket.create_server(("127.0.0.1", 0), backlog=256)
    print(listener.getsockname()[1], flush=True)
    threading.Thread(target=accept, args=(listener, port, delay), daemon=True).start()
    sys.stdin.read()


main()
