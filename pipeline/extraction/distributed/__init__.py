"""One extraction by many processes: shards, and a cluster of Ray that works on them."""
