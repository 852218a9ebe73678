-- wrk's script: the requests of a plan file, one a line (path, token, body; tabs between), each with
-- an Idempotency-Key of its own. After the last line it starts again.
-- Arguments: the plan file, and what the keys of this round begin with.
local threads = {}

function setup(thread)
    table.insert(threads, thread)
end

function init(args)
    prefix, sent, requests = args[2], 0, {}
    for line in io.lines(args[1]) do
        local path, token, body = line:match("^([^\t]*)\t([^\t]*)\t(.*)$")
        requests[#requests + 1] = {
            "POST " .. path .. " HTTP/1.1\r\nHost: bench\r\nAuthorization: Bearer " .. token ..
                "\r\nContent-Type: application/json\r\nContent-Length: " .. #body ..
                "\r\nIdempotency-Key: ",
            "\r\n\r\n" .. body,
        }
    end
end

function request()
    local own = requests[sent % #requests + 1]
    sent = sent + 1
    return own[1] .. prefix .. sent .. own[2]
end

function done(summary, latency, _)
    local errors = summary.errors
    io.stdout:write(string.format(
        '{"requests": %d, "seconds": %.6f, "p50_ms": %.3f, "p99_ms": %.3f, "refused": %d, "broken": %d}\n',
        summary.requests, summary.duration / 1e6,
        latency:percentile(50) / 1000, latency:percentile(99) / 1000,
        errors.status, errors.connect + errors.read + errors.write + errors.timeout
    ))
end
