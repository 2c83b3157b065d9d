"""OpenAI's batches: the format of their lines, the files of tenants, and the runs that answer them."""
