"""OpenAI's HTTP API in front of a tritonserver that serves the engine."""
