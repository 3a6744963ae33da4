"""Hand-written sharding rules, one file per op family; `autopar.ir.registry` merges them."""
