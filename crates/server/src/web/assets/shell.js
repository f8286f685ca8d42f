// What surrounds every page: navigation, state of the connection, who is logged in.

import { h } from './dom.js';
import { icon, mark } from './icons.js';
import { t } from './i18n.js';
import { button, door, empty, head } from './ui.js';

const PAGES = [
  ['overview', '/'], ['vms', '/vms'], ['hosts', '/hosts'], ['cluster', '/cluster'], ['ha', '/ha'], ['balance', '/balance'], ['jobs', '/jobs'], ['policies', '/policies'],
  ['repositories', '/repositories'], ['events', '/events'], ['settings', '/settings'],
];

function isHere(href) {
  const at = location.pathname;
  if (href === '/') return at === '/';
  return at === href || at.startsWith(`${href}/`) || (href === '/events' && at === '/audit');
}

function skip(event) {
  event.preventDefault();
  document.getElementById('main').focus();
}

export function frame(app, content, { update, logOut }) {
  const toggle = () => {
    app.isMenuOpen = !app.isMenuOpen;
    update();
  };
  const link = ([name, href]) => h('a', { href, 'aria-current': isHere(href) ? 'page' : undefined, key: name }, icon(name), t(`nav.${name}`),
    name === 'jobs' && app.running > 0 && h('span', { class: 'chip info count' }, String(app.running), h('span', { class: 'visually-hidden' }, t('nav.running'))));
  return [
    h('a', { class: 'skip', href: '#main', key: 'skip', onclick: skip }, t('nav.skip')),
    h('div', { class: 'frame', key: 'frame' },
      h('div', { class: 'side', 'data-open': String(app.isMenuOpen) },
        h('div', { class: 'side-top' }, h('a', { class: 'brand', href: '/' }, mark(), 'Virtward'),
          h('button', { type: 'button', class: 'button quiet menu', 'aria-expanded': String(app.isMenuOpen), 'aria-controls': 'nav', 'aria-label': t('nav.menu'), onclick: toggle }, icon('menu'))),
        h('nav', { class: 'nav', id: 'nav', 'aria-label': t('nav.main') }, PAGES.filter(([name, href]) => !['cluster', 'ha', 'balance'].includes(name) || app.isCluster || isHere(href)).map(link)),
        h('footer', { class: 'side-foot stack tight' },
          h('div', { class: 'row' }, h('span', { class: 'live', role: 'status', 'data-on': String(app.isLive) }, app.isLive ? t('nav.live') : t('nav.waiting'))),
          h('div', null, app.host, app.version && ` · ${app.version}`),
          h('div', { class: 'row' }, h('span', { title: t(`role.${app.who.role}`) }, app.who.name), app.who.kind === 'session' && button(t('action.log-out'), logOut, { kind: 'quiet small', sign: 'out' })))),
      h('main', { id: 'main', tabindex: '-1' }, content)),
  ];
}

export const missing = () => [head(t('problem.not-found')), empty(t('nav.missing'), door(t('nav.overview'), '/'))];
