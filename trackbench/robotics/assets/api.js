// The server's JSON API.
async function ask(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw Object.assign(new Error("the server does not answer"), { code: "lost" });
  }
  let content = null;
  try {
    content = await response.json();
  } catch {
    // an answer without JSON is an error below
  }
  if (!response.ok) {
    const message = content?.error ?? `${response.status} ${response.statusText}`;
    throw Object.assign(new Error(message), { code: content?.code ?? "", status: response.status });
  }
  return content;
}

const query = (values) => new URLSearchParams(values).toString();

export const get = (name, values = {}) => ask(`/api/${name}?${query(values)}`);

export const post = (name, content) =>
  ask(`/api/${name}`, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(content),
  });

export const fileUrl = (episode, camera, kind, version = "") =>
  `/api/file?${query({ episode, camera, kind, v: version.slice(0, 12) })}`;
