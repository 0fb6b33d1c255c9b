#!/usr/bin/env bash
# Drives a running `quell serve` with curl: curl.sh BASE_URL
# Prints a line a check, and ends with exit code 1 at the first that fails.
set -euo pipefail

url=${1:?usage: curl.sh BASE_URL}

fail() {
    echo "FAILED  $1: $2" >&2
    exit 1
}

# expect NAME TEXT PATTERN: the text has the pattern.
expect() {
    grep -qE -- "$3" <<<"$2" || fail "$1" "no '$3' in: $2"
    echo "ok  $1"
}

post() {
    local path=$1
    shift
    curl -sS --max-time 120 "$url$path" -H 'Content-Type: application/json' "$@"
}

model=$(curl -sS "$url/v1/models" | sed -E 's/.*"id": ?"([^"]+)".*/\1/')
expect "the model has a name" "$model" '^.+$'
expect "it is alive" "$(curl -sS -o /dev/null -w '%{http_code}' "$url/health")" '^200$'
expect "it is ready" "$(curl -sS -o /dev/null -w '%{http_code}' "$url/ready")" '^200$'
expect "it has metrics" "$(curl -sS "$url/metrics")" '^quell_num_requests_running'

chat='{"model": "'$model'", "messages": [{"role": "user", "content": "Who wrote Hamlet?"}], "max_tokens": 16, "temperature": 0'
expect "a chat" "$(post /v1/chat/completions -d "$chat}")" '"content": ?"[^"]*Shakespeare'

streamed=$(post /v1/chat/completions -N -i -d "$chat, \"stream\": true}" | tr -d '\r')
expect "a stream is server-sent events" "$streamed" '^content-type: text/event-stream'
expect "a stream comes in chunks" "$streamed" '^data: \{.*"chat.completion.chunk"'
expect "a stream ends" "$(tail -n 2 <<<"$streamed")" '^data: \[DONE\]$'

expect "a completion" \
    "$(post /v1/completions -d '{"model": "'$model'", "prompt": "The capital of France is", "max_tokens": 4, "temperature": 0}')" \
    '"text": ?".*Paris'
expect "a body from a pipe, in chunks" \
    "$(echo "$chat}" | post /v1/chat/completions -H 'Transfer-Encoding: chunked' --data-binary @-)" 'Shakespeare'
expect "HTTP/1.0" "$(post /v1/chat/completions --http1.0 -d "$chat}")" 'Shakespeare'
expect "HTTP/2 without an upgrade" "$(post /v1/chat/completions --http2-prior-knowledge -d "$chat}")" 'Shakespeare'
expect "a large body that waits for 100 Continue" \
    "$(post /v1/chat/completions -H 'Expect: 100-continue' -d "$chat}")" 'Shakespeare'

expect "a HEAD request" "$(curl -sS -I "$url/health")" '^HTTP/1.1 200'
expect "an id comes back" \
    "$(curl -sS -i -H 'x-request-id: from-curl' "$url/health" | tr -d '\r')" '^x-request-id: from-curl$'
expect "a wrong method" "$(curl -sS -o /dev/null -w '%{http_code}' "$url/v1/chat/completions")" '^405$'
expect "an unknown route" "$(curl -sS "$url/v1/nothing")" '"error"'
expect "broken JSON" "$(post /v1/completions -d '{"model"')" '"invalid_request_error"'
expect "a form instead of JSON" \
    "$(curl -sS -o /dev/null -w '%{http_code}' "$url/v1/completions" -d a=1)" '^415$'

# A stream that is cut: curl gives up after a second.
status=0
post /v1/completions -N --max-time 1 -o /dev/null \
    -d '{"model": "'$model'", "prompt": "For ever", "max_tokens": 8000, "ignore_eos": true, "stream": true}' \
    2>/dev/null || status=$?
expect "curl gives up in the middle of a stream" "$status" '^28$'
until=$((SECONDS + 60))
while [ "$SECONDS" -lt "$until" ]; do
    active=$(curl -sS "$url/metrics" | sed -nE 's/^quell_kv_blocks\{.*state="active".*\} (.*)/\1/p')
    [ "$active" = 0 ] && break
done
expect "a cut stream holds no block" "$active" '^0$'
