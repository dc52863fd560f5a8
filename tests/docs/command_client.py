"""What the programs of a page's shell blocks are: it sends its words and files to the command server, and waits.

Starting Python with torch takes seconds, a fork of the server that has it nothing.
"""

import os
import socket
import struct
import sys

if __name__ == "__main__":
    words = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
    variables = [f"{name}={value}" for name, value in os.environ.items()]
    message = "\0".join([os.getcwd(), str(len(words)), *words, *variables]).encode()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.environ["COMMAND_SERVER"])
        socket.send_fds(connection, [struct.pack("!I", len(message))], [0, 1, 2])
        connection.sendall(message)
        status = connection.recv(1)
    sys.exit(status[0] if status else 1)
