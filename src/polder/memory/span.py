import numpy as np
from polder.memory.tensor import tensor_over
class Span:
    def __init__(self,backend,slots):
        self.backend=backend; self.n=slots; self.va=backend.reserve(slots*backend.page_bytes); self.mapped=np.zeros(slots,bool); self._t=None
    def address(self,slot): return self.va+slot*self.backend.page_bytes
    def _runs(self,slots):
        i=0
        while i<len(slots):
            j=i+1
            while j<len(slots) and slots[j]==slots[j-1]+1: j+=1
            yield i,j; i=j
    def map(self,slots,handles):
        assert not self.mapped[slots].any()
        for i,j in self._runs(slots): self.backend.map(self.address(int(slots[i])),handles[i:j])
        self.mapped[slots]=True
    def unmap(self,slots):
        assert self.mapped[slots].all()
        for i,j in self._runs(slots): self.backend.unmap(self.address(int(slots[i])),j-i)
        self.mapped[slots]=False
    def zero(self,slots):
        for i,j in self._runs(slots): self.backend.zero(self.address(int(slots[i])),(j-i)*self.backend.page_bytes)
    def tensor(self):
        if self._t is None: self._t=tensor_over(self.va,self.n*self.backend.page_bytes,None,self)
        return self._t
    def close(self): self.backend.free(self.va,self.n*self.backend.page_bytes)
