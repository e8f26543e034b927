"""Workloads, load drivers, metrics and reports. Every bench writes JSON of the one shape in
`polder.bench.report.result`."""
