/** Talking to the server this page came from. The API key lives in this module's memory and nowhere else. */

let key = '';

export const setKey = (value) => { key = value.trim(); };
export const hasKey = () => key !== '';

/** The server refused for want of an API key, or of the right one. */
export class KeyNeeded extends Error {}

/** The server is not ready yet. */
export class NotReady extends Error {}

/** There is no server at the other end, or the connection broke. */
export class Gone extends Error {}

async function request(path, options = {}) {
  const headers = { ...options.headers };
  if (key) headers.Authorization = `Bearer ${key}`;
  const answer = await reached(fetch(path, { ...options, headers, credentials: 'omit', redirect: 'error' }));
  if (answer.ok) return answer;
  const problem = await answer.json().catch(() => null);
  const message = problem?.error?.message ?? problem?.detail ?? `HTTP ${answer.status}`;
  const Kind = { 401: KeyNeeded, 503: NotReady }[answer.status] ?? Error;
  throw new Kind(String(message));
}

/** What a promise of the network gives; its failure becomes Gone unless the page itself ended the request. */
async function reached(promise) {
  try {
    return await promise;
  } catch (error) {
    throw error.name === 'AbortError' || error.name === 'TimeoutError' ? error : new Gone(error.message);
  }
}

/** "ready", "loading" (it answers, but not yet with a model), "slow" (no answer within `milliseconds`) or "gone". */
export async function getHealth(milliseconds) {
  try {
    const answer = await fetch('/health', { signal: AbortSignal.timeout(milliseconds), cache: 'no-store', credentials: 'omit' });
    await answer.text();
    return answer.status === 503 ? 'loading' : 'ready';
  } catch (error) {
    return error.name === 'TimeoutError' ? 'slow' : 'gone';
  }
}

/** What the server says about its model. */
export async function getModel() {
  return (await request('/soli/model')).json();
}

/** For how many tokens one expert has played since the server started. `layer` is the number in the layer's name. */
export async function getExpert(layer, expert) {
  return (await request(`/soli/experts/${layer}/${expert}`)).json();
}

/** Which experts of each layer are in memory now, and which are being read. */
export async function getTiers() {
  return (await request('/soli/experts')).json();
}

/**
 * Posts a request and yields the objects of its event stream as they come.
 * @param {string} path
 * @param {object} body
 * @param {AbortSignal} signal  aborting closes the connection, and the server frees the place
 * Throws Gone if the stream ends before its end mark.
 */
export async function* stream(path, body, signal) {
  const answer = await request(path, {
    method: 'POST', headers: { 'Content-Type': 'application/json' }, body: JSON.stringify({ ...body, stream: true }), signal,
  });
  for await (const data of serverSentData(answer.body)) {
    if (data === '[DONE]') return;
    const event = JSON.parse(data);
    if (event.error) throw new Error(event.error.message ?? String(event.error));
    yield event;
  }
  throw new Gone('the answer broke off');
}

async function* serverSentData(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let pieces = []; // of an event whose end has not come; joined once, however long it is
  try {
    for (;;) {
      const { done, value } = await reached(reader.read());
      if (done) return;
      const parts = value.replaceAll('\r', '').split('\n');
      for (let i = 0; i < parts.length; i += 1) {
        pieces.push(parts[i]);
        if (i === parts.length - 1) break;
        const line = pieces.join('');
        pieces = [];
        if (line.startsWith('data:')) yield line.slice(5).trim();
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** The path and body that ask for `text` in `mode`; `past` are the earlier messages of a chat. */
export function asking(mode, text, { to, past, maxTokens, name, mutes }) {
  const soli = { routing: 'full', masked_experts: mutes };
  const common = { model: name, max_tokens: maxTokens, temperature: 0, soli };
  if (mode === 'translate') return ['/soli/translate', { text, to: to || null, soli }];
  if (mode === 'chat') return ['/v1/chat/completions', { messages: [...past, { role: 'user', content: text }], ...common }];
  return ['/v1/completions', { prompt: text, ...common }];
}
