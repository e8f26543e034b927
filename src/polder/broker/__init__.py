"""Who holds which page of each device, and who must give some back: ledger, leases, policy, server and client."""
