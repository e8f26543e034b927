import array, os, socket
from polder.errors import ProtocolError
def send_fds(sock, data, fds): return socket.send_fds(sock,[data],fds)
def recv_fds(sock, max_bytes, max_fds):
    data, fds, flags, _ = socket.recv_fds(sock, max_bytes, max_fds, socket.MSG_CMSG_CLOEXEC)
    return data, list(fds)
