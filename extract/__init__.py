"""Stage one: texts through the frozen LLM into a cache."""
