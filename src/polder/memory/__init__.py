"""Physical pages, reserved addresses and everything that moves between them, for one process and one device.

A backend (`cpu.CpuBackend`, `cuda.CudaBackend`) reserves addresses and makes pages. The broker owns a device's pages by
number (`pool.PagePool`) and hands them out as file descriptors (`handoff`). An engine's worker adopts them
(`pool.ImportedPages`), maps them at the slots of its `span.Span`, over which it has made its tensors once, and moves
blocks with a `copy.CopyEngine`. Who gets what is the broker's decision. `backend` is the manual.
"""
