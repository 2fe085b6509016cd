"""Policy without devices: requests and their states, queue, KV pages, packing, slots, scheduler."""
