import os
from polder.memory.page import Handle
class PagePool:
    def __init__(self,backend,total): self.backend=backend; self._h=backend.create(total)
    def export(self,pages): return [os.dup(self._h[0].fd)],[0]*len(pages),[self._h[p].offset for p in pages]
    def close(self): os.close(self._h[0].fd)
class ImportedPages:
    def __init__(self,backend): self.b=backend; self._h={}; self._fd={}
    def missing(self,g,pages): return [p for p in pages if (g,p) not in self._h]
    def adopt(self,g,pages,fds,idx,offs):
        if g not in self._fd: self._fd[g]=os.dup(fds[0])
        for p,o in zip(pages,offs): self._h[g,p]=Handle(self._fd[g],o)
    def handles(self,g,pages): return [self._h[g,p] for p in pages]
    def discard(self,g,pages): self.b.destroy([self._h.pop((g,p)) for p in pages])
