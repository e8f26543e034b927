import ctypes
class CopyEngine:
    def __init__(self,backend): pass
    def submit_blocks(self,db,ds,di,sb,ss,si,n):
        for d,s in zip(di.tolist(),si.tolist()): ctypes.memmove(db+d*ds,sb+s*ss,n)
        return 1
    def wait(self,t): pass
    def close(self): pass
