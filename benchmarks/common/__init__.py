"""What benchmarks and tests share: packs, cases, oracles and the bounds of their errors."""
