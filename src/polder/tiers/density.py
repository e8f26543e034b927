"""draft 2"""
from __future__ import annotations
import math
import numpy as np
from polder.errors import IntegrityError
from polder.tiers.eviction import BoolArray, IntArray, UintArray

BINS=56
STEP=3      # bins per octave
FIRST=0.25
EDGES=np.concatenate([[0.0],FIRST*2.0**(np.arange(BINS)/STEP)])
WIDTH=np.diff(EDGES)

def bin_of(age):
    return np.searchsorted(EDGES[1:-1],age,side='right')

class HitDensity:
    HITS=4; LENS=1; FRACS=3; GAPS=1
    PRIOR=200.0; HALFLIFE=3600.0; GHOSTS=4; BATCH=32; REBUILD_S=5.0; Q=64
    GAP_EDGES=(30.0,120.0); FRAC_EDGES=(0.25,0.75); LEN_EDGES=(8,24,64)
    def __init__(self,capacity):
        self.capacity=capacity
        z=lambda: np.zeros(capacity,np.int64)
        self.key=np.zeros(capacity,np.uint64); self.depth=z(); self.hits=z(); self.cls=np.full(capacity,-1); self.turn=np.full(capacity,-1)
        self.last=np.zeros(capacity)
        n=1<<max(6,math.ceil(math.log2(max(1,self.GHOSTS*capacity))))
        self.gmask=np.uint64(n-1)
        self.gkey=np.zeros(n,np.uint64); self.glast=np.zeros(n); self.ghits=np.zeros(n,np.int64); self.gcls=np.full(n,-1,np.int64)
        self.R=self.LENS*self.FRACS*self.GAPS; self.C=self.HITS*self.R
        self.hit=np.zeros((self.C,BINS)); self.ended=np.zeros((self.C,BINS))
        self.rank=np.tile(1.0/(EDGES[:-1]+1.0),(self.C,1)); self._q()
        self.built=None; self.batch=0; self.now=-1.0
        self.queue=np.empty(0,np.int64); self.queue_turn=np.empty(0,np.int64); self.queue_rank=np.empty(0)
        self.req=(0,-1.0)  # found so far at self.now, gap
    def _q(self):
        self.qrank=(np.log2(np.maximum(self.rank,1e-9))*self.Q).astype(np.int64)+31*self.Q
    def _tick(self,now):
        if now!=self.now:
            self.batch+=1; self.now=now; self.req=(0,-1.0)
            if self.built is None: self.built=now
            if now-self.built>self.REBUILD_S: self._build()
    def _class(self,hits,length,found,gap):
        r=0
        if self.LENS>1: r=int(np.searchsorted(self.LEN_EDGES,length))
        if self.FRACS>1: r=r*self.FRACS+int(np.searchsorted(self.FRAC_EDGES,found/max(1,length)))
        if self.GAPS>1: r=r*self.GAPS+(int(np.searchsorted(self.GAP_EDGES,gap)) if gap>=0 else self.GAPS-1)
        return np.minimum(hits,self.HITS-1)*self.R+r
    def _ghost(self,keys):
        at=(keys&self.gmask).astype(np.int64)
        return at,(self.gkey[at]==keys)&(self.gcls[at]>=0)
    def touch(self,slots,now):
        self._tick(now)
        if not len(slots): return
        age=now-self.last[slots]
        again=age>0
        s=slots[again]
        if len(s):
            age=age[again]
            np.add.at(self.hit,(self.cls[s],bin_of(age)),1.0)
            self.hits[s]=np.maximum.accumulate(self.hits[s][::-1]+1)[::-1]; self.last[s]=now; self.turn[s]=self.batch
            self.req=(len(slots),float(age[-1]))
            self.touched=s
            self._reclass(len(slots))
    def _reclass(self,length):
        s=self.touched
        self.cls[s]=self._class(self.hits[s],length,*self.req)
    def missed(self,keys,now):
        self._tick(now)
        if not len(keys): return
        at,known=self._ghost(keys)
        k=at[known]
        hits=np.zeros(len(keys),np.int64)
        found=self.req[0]
        length=found+len(keys)
        if len(k):
            age=now-self.glast[k]
            np.add.at(self.hit,(self.gcls[k],bin_of(age)),1.0)
            hits[known]=self.ghits[k]+1
            hits=np.maximum.accumulate(hits[::-1])[::-1]
            if found: self.hits[self.touched]=np.maximum(self.hits[self.touched],hits[0])
            self.gcls[k]=-1
            self.req=(found+len(k),float(age[-1]))
        if found: self._reclass(length)
        cls=self._class(hits,length,*self.req)
        self._remember(keys,now,hits,cls,at)
    def insert(self,slots,keys,depths,now):
        self._tick(now)
        at,known=self._ghost(keys)
        hits=np.where(known,self.ghits[at],0)
        self.key[slots]=keys; self.depth[slots]=depths; self.last[slots]=now; self.turn[slots]=self.batch
        self.hits[slots]=hits
        self.cls[slots]=np.where(known,self.gcls[at],self._class(hits,int(depths[-1])+1,0,-1.0))
        self.gcls[at[known]]=-1
    def admits(self,keys,depths,now):
        self._tick(now)
        at,known=self._ghost(keys)
        cls=np.where(known,self.gcls[at],self._class(np.zeros(len(keys),np.int64),int(depths[-1])+1,0,-1.0))
        mine=self.rank[cls,0]
        self._refill(len(keys))
        v=self.queue_rank[self._fresh()][:len(keys)]
        want=np.zeros(len(keys),bool); want[:len(v)]=mine[:len(v)]>=v
        return np.logical_and.accumulate(want)
    def _remember(self,keys,last,hits,cls,at=None):
        if at is None: at=(keys&self.gmask).astype(np.int64)
        old=(self.gcls[at]>=0)
        o=at[old]
        if len(o): np.add.at(self.ended,(self.gcls[o],bin_of(np.maximum(self.now-self.glast[o],0))),1.0)
        self.gkey[at]=keys; self.glast[at]=last; self.ghits[at]=hits; self.gcls[at]=cls
    def remove(self,slots):
        self._remember(self.key[slots],self.last[slots],self.hits[slots],self.cls[slots])
        self.cls[slots]=-1
        self.turn[slots]=-1
    def _build(self):
        f=0.5**((self.now-self.built)/self.HALFLIFE); self.hit*=f; self.ended*=f
        self.built=self.now
        live=np.zeros(self.C*BINS)
        for c,l in ((self.cls,self.last),(self.gcls,self.glast)):
            o=np.flatnonzero(c>=0)
            live+=np.bincount(c[o]*BINS+bin_of(self.now-l[o]),minlength=self.C*BINS)
        cens=self.ended+live.reshape(self.C,BINS)
        tot=cens+self.hit
        risk=np.cumsum(tot[:,::-1],axis=1)[:,::-1]-0.5*cens
        pool_q=self.hit.sum(0)/np.maximum(risk.sum(0),1.0)
        q=np.clip((self.hit+self.PRIOR*pool_q)/(risk+self.PRIOR),0,1)
        keep=np.cumprod(1-q,axis=1)
        S=np.concatenate([np.ones((self.C,1)),keep[:,:-1]],axis=1)
        hitp=S*q; occ=WIDTH*(S-hitp/2)
        z=np.zeros((self.C,1))
        H=np.concatenate([z,np.cumsum(hitp,axis=1)],axis=1)
        T=np.concatenate([z,np.cumsum(occ,axis=1)],axis=1)
        r=np.empty((self.C,BINS))
        for i in range(BINS):
            r[:,i]=((H[:,i+1:]-H[:,i:i+1])/np.maximum(T[:,i+1:]-T[:,i:i+1],1e-12)).max(axis=1)
        r=np.maximum.accumulate(r.reshape(self.HITS,self.R,BINS),axis=0).reshape(self.C,BINS)
        self.rank=r; self._q()
        self.queue=self.queue[:0]; self.queue_turn=self.queue_turn[:0]; self.queue_rank=self.queue_rank[:0]
    def _fresh(self):
        return self.turn[self.queue]==self.queue_turn
    def _order(self,count,mask):
        s=np.flatnonzero(mask)
        c,b=self.cls[s],bin_of(self.now-self.last[s])
        comp=(self.qrank[c,b]<<43)|((self.turn[s]&0x7fffffff)<<12)|(4095-np.minimum(self.depth[s],4095))
        if count<len(s):
            p=np.argpartition(comp,count)[:count]; p=p[np.argsort(comp[p])]
        else: p=np.argsort(comp)
        return s[p],self.rank[c[p],b[p]]
    def _refill(self,count):
        if np.count_nonzero(self._fresh())<count:
            n=max(2*count,self.capacity//self.BATCH)
            self.queue,self.queue_rank=self._order(n,self.cls>=0)
            self.queue_turn=self.turn[self.queue]
    def victims(self,count,pinned):
        self._refill(count)
        ok=self._fresh()&~pinned[self.queue]
        got=self.queue[ok][:count]
        if len(got)<count:
            got=self._order(count,(self.cls>=0)&~pinned)[0]
        return got
    def check_integrity(self): pass
