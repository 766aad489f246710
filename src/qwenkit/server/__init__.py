"""Room 8: one loaded model as a web server: the OpenAI API, and Ollama's.

`app.make_app` makes an ASGI application of an `AsyncLLM`, `run.serve` runs it. One group of
endpoints a file; `wire/` has the shapes of what is sent and answered. `guard` stands before all of
it and looks at every request first.
"""
