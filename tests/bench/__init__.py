"""The benchmark: `make bench`. Ways to keep a core side by side, interleaved, into docs/performance.md."""
