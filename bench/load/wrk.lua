-- Requests out of a file, one after the other and round again; a run of @ in one becomes a number that counts up.
-- Arguments: the file, the first number. The file: a length in bytes on a line of its own, a whole request, and so on.

local requests, position, number = {}, 0, 0

function init(args)
  number = tonumber(args[2])
  local file = assert(io.open(args[1], "rb"))
  while true do
    local length = file:read("*l")
    if length == nil then break end
    local text = file:read(tonumber(length))
    local from, to = text:find("@@@@@@@@+")
    if from then
      requests[#requests + 1] = { text:sub(1, from - 1), text:sub(to + 1), "%0" .. (to - from + 1) .. "d" }
    else
      requests[#requests + 1] = text
    end
  end
  file:close()
end

function request()
  position = position % #requests + 1
  local text = requests[position]
  if type(text) == "string" then return text end
  number = number + 1
  return text[1] .. text[3]:format(number) .. text[2]
end

function done(summary, latency)
  local errors = summary.errors
  print(string.format(
    '{"requests":%d,"microseconds":%d,"refused":%d,"broken":%d,"p50":%d,"p95":%d,"p99":%d,"max":%d}',
    summary.requests, summary.duration, errors.status, errors.connect + errors.read + errors.write + errors.timeout,
    latency:percentile(50), latency:percentile(95), latency:percentile(99), latency.max))
end
