"""Token exchange between expert-parallel ranks."""
