// Start, log-in, and the life of a page: read, show, follow.

import * as api from './api.js';
import { patch } from './dom.js';
import { keepTime } from './format.js';
import { preferred, t, use } from './i18n.js';
import { login } from './pages/login.js';
import { find } from './router.js';
import { frame, missing } from './shell.js';
import { follow } from './stream.js';
import * as theme from './theme.js';
import { head, soon, trouble, waiting } from './ui.js';

// How soon a page is read again when something changed while it was read.
const AGAIN_MS = 1000;

const app = { who: null, isLive: false, isMenuOpen: false, isCluster: false, running: 0, host: '' };
const root = document.getElementById('app');
let page = null;
let problem = null;
let isLoaded = false;
let isDue = false;
let unfollow = null;

/** Shows what is known, once per frame at most. */
export function update() {
  if (isDue) return;
  isDue = true;
  // Not requestAnimationFrame: it stands still in tabs that are not seen, and the title would too.
  setTimeout(() => {
    isDue = false;
    draw();
  }, 16);
}

function draw() {
  if (!app.who) return;
  document.title = page ? `${page.title()} · Virtward` : 'Virtward';
  const content = !page ? missing() : problem ? [head(page.title()), trouble(problem)] : isLoaded ? page.view() : [waiting()];
  patch(root, frame(app, content, { go, update, logOut, change }));
}

/** Reads what the page shows. Asked again meanwhile, it reads once more afterwards: the last wish counts. */
async function load() {
  const mine = page;
  mine.isWanted = true;
  mine.reading ??= (async () => {
    while (mine.isWanted && mine === page) {
      mine.isWanted = false;
      await read(mine);
    }
    mine.reading = null;
  })();
  await mine.reading;
}

async function read(mine) {
  try {
    await mine.load();
    if (mine === page) problem = null;
  } catch (error) {
    if (error.code === undefined) throw error;
    if (mine === page) problem = error;
  }
  if (mine !== page) return;
  isLoaded = true;
  update();
}

/** Shows the page of the address. */
async function show({ isMoved }) {
  page?.end?.();
  const found = find(location.pathname);
  [problem, isLoaded, app.isMenuOpen] = [null, !found, false];
  page = found?.make({ params: found.params, query: new URLSearchParams(location.search), who: app.who, update, go, load, change }) ?? null;
  draw();
  if (isMoved) {
    window.scrollTo(0, 0);
    document.querySelector('main')?.focus();
  }
  if (page) await load();
}

/** Goes to an address within the page. */
export function go(href, { replace = false } = {}) {
  if (replace) return history.replaceState(null, '', href);
  history.pushState(null, '', href);
  return show({ isMoved: true });
}

function change() {
  theme.apply();
  return use(preferred()).then(update);
}

async function logOut() {
  await api.logOut().catch(() => {});
  location.assign('/');
}

function heard(name, data) {
  if (name === 'reset' || name === 'job') countSoon();
  if (name === 'reset') {
    if (page && isLoaded) load();
    return;
  }
  // What changes while the page is being read may be in what is read, or not.
  if (name !== 'progress' && page?.reading && page.on?.[name]) {
    const mine = page;
    mine.again ??= setTimeout(() => {
      mine.again = null;
      if (mine === page) load();
    }, AGAIN_MS);
  }
  const handler = page && isLoaded && !problem ? page.on?.[name] : null;
  if (handler && handler(data) !== false) update();
}

/** How many jobs run, for the navigation. */
async function count() {
  try {
    const { total } = await api.get(['jobs'], { state: 'running,queued', limit: 1 });
    app.running = total ?? 0;
    update();
  } catch {
    // The navigation does without.
  }
}

const countSoon = soon(count);

function clicked(event) {
  const link = event.target.closest?.('a[href]');
  if (!link || event.defaultPrevented || event.button !== 0 || event.metaKey || event.ctrlKey || event.shiftKey || event.altKey) return;
  // Links in drawings have an address of another kind.
  const href = typeof link.href === 'string' ? link.href : new URL(link.href.baseVal, location.href).href;
  const to = new URL(href);
  if (to.origin !== location.origin || to.pathname.startsWith('/api/') || link.target || to.hash) return;
  event.preventDefault();
  go(to.pathname + to.search);
}

async function enter(who) {
  app.who = who;
  unfollow?.();
  unfollow = follow(heard, (isLive) => {
    app.isLive = isLive;
    update();
  }, () => api.whoami().then((still) => still || ask(), () => {}));
  patch(root, []);
  await Promise.all([show({ isMoved: false }), count(), api.get(['version']).then((version) => {
    app.host = version.host;
    app.version = version.version;
    update();
  }), api.get(['cluster']).then((cluster) => {
    app.isCluster = cluster.is_cluster;
    update();
  })]);
}

function ask() {
  unfollow?.();
  [unfollow, app.who, page] = [null, null, null];
  login(enter, change);
}

theme.apply();
await use(preferred());
keepTime();
document.addEventListener('click', clicked);
window.addEventListener('popstate', () => app.who && show({ isMoved: true }));
api.onLoggedOut(() => app.who && ask());
try {
  const who = await api.whoami();
  if (who) await enter(who);
  else ask();
} catch (error) {
  patch(root, [trouble(error)]);
}
