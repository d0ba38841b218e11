"""Stage two: heads trained from a cache, many seeds and depths, without the LLM."""
