#!/usr/bin/env bash
# Serve MODEL pruned, ask it once with curl, stop it: bash examples/vllm/serve.sh MODEL [options of pp-fx serve]
set -euo pipefail
pp-fx serve "$@" --served-model-name pruned --port 8000 &
server=$!
trap 'kill -INT $server; wait $server || true' EXIT
until curl -sf localhost:8000/health > /dev/null; do
  kill -0 $server
  sleep 1
done
curl -s localhost:8000/v1/completions -H 'Content-Type: application/json' \
  -d '{"model": "pruned", "prompt": "In winter the snow covers the ground. In spring", "max_tokens": 16, "temperature": 0}'
