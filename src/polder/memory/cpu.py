import ctypes, mmap, os
from polder.memory.page import Handle, PAGE_BYTES
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes=[ctypes.c_void_p, ctypes.c_size_t]
_libc.fallocate.argtypes=[ctypes.c_int,ctypes.c_int,ctypes.c_long,ctypes.c_long]
def _m(va,n,prot,flags,fd,off):
    p=_libc.mmap(va,n,prot,flags,fd,off)
    if p in (None, ctypes.c_void_p(-1).value): raise OSError(ctypes.get_errno(),'mmap')
    return int(p)
class CpuBackend:
    def __init__(self,*,page_bytes=PAGE_BYTES,device='cpu:0'): self.page_bytes,self.device=page_bytes,device
    def reserve(self,n):
        A=2<<20; p=_m(None,n+A,0,0x4022,-1,0); va=-(-p//A)*A
        if va>p: _libc.munmap(p,va-p)
        if p+A>va: _libc.munmap(va+n,p+A-va)
        return va
    def free(self,va,n): _libc.munmap(va,n)
    def create(self,count):
        fd=os.memfd_create('polder',os.MFD_CLOEXEC); os.ftruncate(fd,count*self.page_bytes)
        return [Handle(fd,i*self.page_bytes) for i in range(count)]
    def destroy(self,handles):
        for h in handles: _libc.fallocate(h.fd,3,h.offset,self.page_bytes)
    def map(self,address,handles):
        i=0; P=self.page_bytes
        while i<len(handles):
            j=i+1
            while j<len(handles) and handles[j].fd==handles[j-1].fd and handles[j].offset==handles[j-1].offset+P: j+=1
            _m(address+i*P,(j-i)*P,3,0x1|0x10|0x8000,handles[i].fd,handles[i].offset); i=j
    def unmap(self,address,count): _m(address,count*self.page_bytes,0,0x4022|0x10,-1,0)
    def zero(self,address,n): ctypes.memset(address,0,n)
    def fence(self): pass
    def close(self): pass
