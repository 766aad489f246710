"""Room 5: requests to tokens. Continuous batching over a paged KV cache, sampling and stopping.

One step is schedule → execute → apply: `request`, `blocks`, `scheduler`, `text` and `guards` decide
and know no tensor; `kv`, `batch`, `paged`, `runner`, `sampler` and `logprobs` have the tensors;
`engine` joins them and `service` gives them a thread. The room is given a built model and a
tokenizer and knows nothing of architectures, files or chat.
"""
