"""Replays recorded traces through the tiers' eviction policies, and through Belady's optimal one."""
