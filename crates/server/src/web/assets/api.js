// Requests to the daemon. Changes carry the session's CSRF token; every refusal becomes a `Problem`.

const BASE = '/api/v1';

/** What the daemon answered instead (RFC 9457), or that it did not answer. */
export class Problem extends Error {
  constructor(body) {
    super(body.detail ?? body.title ?? body.code);
    this.code = body.code;
    this.status = body.status;
    this.hint = body.hint;
    this.errors = body.errors ?? [];
  }
}

let csrf = null;
let lost = () => {};

/** What to do when the session ended. */
export function onLoggedOut(callback) {
  lost = callback;
}

async function send(method, path, { body, headers = {} } = {}) {
  const all = { accept: 'application/json', ...headers };
  if (body !== undefined) all['content-type'] = 'application/json';
  if (method !== 'GET' && csrf) all['x-csrf-token'] = csrf;
  let response;
  try {
    response = await fetch(BASE + path, {
      method, headers: all, credentials: 'same-origin', body: body === undefined ? undefined : JSON.stringify(body),
    });
  } catch {
    throw new Problem({ code: 'unreachable', status: 0 });
  }
  const isJson = (response.headers.get('content-type') ?? '').includes('json');
  const answer = isJson ? await response.json() : null;
  if (response.ok) return answer;
  const problem = new Problem(answer ?? { code: 'internal', status: response.status });
  if (response.status === 401 && path !== '/session') lost();
  throw problem;
}

/** A path with its parts escaped and a query without what is empty. */
export function path(parts, query = {}) {
  const words = parts.map((part) => encodeURIComponent(part)).join('/');
  const search = new URLSearchParams();
  for (const [name, value] of Object.entries(query)) {
    if (value !== undefined && value !== null && value !== '') search.set(name, value);
  }
  const text = search.toString();
  return `/${words}${text ? `?${text}` : ''}`;
}

export const get = (parts, query) => send('GET', path(parts, query));
export const put = (parts, body, headers) => send('PUT', path(parts), { body, headers });
export const remove = (parts) => send('DELETE', path(parts));

/** `key` makes repetitions of the same request harmless. */
export function post(parts, body, key) {
  return send('POST', path(parts), { body, headers: key ? { 'idempotency-key': key } : {} });
}

/** A key for one thing that somebody wants. */
export const newKey = () => [...crypto.getRandomValues(new Uint8Array(16))].map((b) => b.toString(16).padStart(2, '0')).join('');

/** Who is logged in; null if nobody is. */
export async function whoami() {
  try {
    const who = await send('GET', '/whoami');
    csrf = who.csrf_token ?? null;
    return who;
  } catch (problem) {
    if (problem.status === 401) return null;
    throw problem;
  }
}

export async function logIn(token) {
  const { principal } = await send('POST', '/session', { body: { token } });
  csrf = principal.csrf_token ?? null;
  return principal;
}

export async function logOut() {
  await send('DELETE', '/session');
  csrf = null;
}

const RANKS = { viewer: 0, operator: 1, admin: 2 };

/** Whether somebody may do what this role may. */
export const may = (who, role) => who !== null && RANKS[who.role] >= RANKS[role];
