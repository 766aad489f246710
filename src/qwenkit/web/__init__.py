"""The chat page: a Gradio app in a process of its own, a client of any OpenAI-compatible server.

What a conversation is (`conversation`), how it looks (`transcript`, `markdown`) and what is sent
(`request`, `reply`) is plain data and text; `layout` and `actions` are the only files that know
Gradio, `client` the only one that knows the network.
"""
