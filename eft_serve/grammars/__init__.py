"""Structured output: grammars of JSON schemas, regular expressions and choices, and matchers that outputs follow."""
