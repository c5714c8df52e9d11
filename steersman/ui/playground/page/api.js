// The server's API: JSON in and out, errors as one line, generation as a stream of events.

/** What went wrong, as one line for a person. `status` is 0 where the server did not answer. */
export class ApiError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/** An error's line without the place in the request that it begins with, for where the page shows that place itself. */
export const withoutPlace = (message) => message.replace(/^state\.(interventions\[\d+\]|generation)?[.:]? */, "");

const SILENT = "the server does not answer: is `steersman ui` still running?";

async function request(path, body, signal) {
  const options = { signal, credentials: "same-origin", headers: { Accept: "application/json" } };
  if (body !== undefined) {
    options.method = "POST";
    options.headers["Content-Type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  let answer;
  try {
    answer = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(SILENT);
  }
  if (!answer.ok) throw new ApiError(await problem(answer), answer.status);
  return answer;
}

async function problem(answer) {
  try {
    const { error } = await answer.json();
    if (typeof error === "string" && error) return error;
  } catch {
    // not JSON: the status says what there is to say
  }
  return `the server answered ${answer.status} ${answer.statusText}`.trim();
}

export async function get(path, parameters = {}, signal = undefined) {
  const given = Object.entries(parameters).filter(([, value]) => value !== undefined && value !== "");
  const query = new URLSearchParams(given).toString();
  return (await request(query ? `${path}?${query}` : path, undefined, signal)).json();
}

export async function post(path, body, signal = undefined) {
  return (await request(path, body, signal)).json();
}

/** The events {event, data} of a stream of server-sent events, one by one. */
export async function* events(path, body, signal = undefined) {
  const answer = await request(path, body, signal);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const blocks = (rest + value.replaceAll("\r", "")).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        const found = parsed(block);
        if (found) yield found;
      }
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("the connection to the server broke off");
  } finally {
    reader.cancel().catch(() => {});
  }
}

function parsed(block) {
  let event = "message";
  const data = [];
  for (const line of block.split("\n")) {
    if (line.startsWith("event:")) event = line.slice(6).trim();
    else if (line.startsWith("data:")) data.push(line.slice(5).trimStart());
  }
  return data.length ? { event, data: JSON.parse(data.join("\n")) } : null;
}
