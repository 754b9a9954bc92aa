#!/bin/sh
# Whether the server at $1, as host:port, is alive with its model paged_llm. Servers before 26.01 call a model ready whose
# stub process has died: only an answer tells. No answer in time means a busy engine, not a dead one.
curl -sf -m 5 --noproxy '*' "$1/v2/models/paged_llm/ready" || exit 1
! curl -s -m 10 --noproxy '*' "$1/v2/models/paged_llm/generate" -d \
  '{"text_input": "a", "max_tokens": 1, "priority": -1000, "timeout_ms": 9000}' | grep 'is not healthy'
