-- For wrk: sends BODY_FILE with POST, and prints what was measured as one line of JSON.
-- Settings are environment variables: BODY_FILE, CONTENT_TYPE, and HEADER_LENGTH for the Open Inference Protocol's
-- binary tensors.
local file = assert(io.open(os.getenv("BODY_FILE"), "rb"))
wrk.method = "POST"
wrk.body = file:read("*a")
file:close()
wrk.headers["Content-Type"] = os.getenv("CONTENT_TYPE")
if os.getenv("HEADER_LENGTH") then
  wrk.headers["Inference-Header-Content-Length"] = os.getenv("HEADER_LENGTH")
end

function done(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format(
    '{"seconds": %f, "requests": %d, "refused": %d, "broken": %d, "p50_ms": %f, "p99_ms": %f}\n',
    summary.duration / 1e6, summary.requests, errors.status,
    errors.connect + errors.read + errors.write + errors.timeout,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3))
end
