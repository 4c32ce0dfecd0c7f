-- For wrk: sends BODY_FILE with POST, and prints what was measured as one line of JSON.
-- Settings are environment variables: BODY_FILE and CONTENT_TYPE.
local file = assert(io.open(os.getenv("BODY_FILE"), "rb"))
wrk.method = "POST"
wrk.body = file:read("*a")
file:close()
wrk.headers["Content-Type"] = os.getenv("CONTENT_TYPE")

function done(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format('{"seconds": %f, "requests": %d, "refused": %d, "broken": %d}\n',
    summary.duration / 1e6, summary.requests, errors.status,
    errors.connect + errors.read + errors.write + errors.timeout))
end
