// Who changed what, whether it was made or refused.

import * as api from '../api.js';
import { h } from '../dom.js';
import { clock } from '../format.js';
import { t } from '../i18n.js';
import { card, empty, head, table, tail } from '../ui.js';
import { keep, missing, nodeChoice, nodes } from './shared.js';

/** A text with its ids cut short; all of one is there on hover. */
const shortened = (text) => text.split(/([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})/).map((part, at) => (at % 2 === 1 ? tail(part) : part));

export default function audit({ query, go, load, update }) {
  const filter = { who: query.get('who') ?? '', action: query.get('action') ?? '', node: query.get('node') ?? '' };
  let [items, next, away, names, typing] = [[], null, [], [], null];

  async function read(cursor) {
    const page = await api.get(['audit'], { ...filter, node: filter.node || (names.length > 1 ? 'all' : ''), cursor });
    items = cursor ? [...items, ...page.items] : page.items;
    [next, away] = [page.next, page.missing ?? []];
  }

  function input(name) {
    return h('input', { type: 'search', class: 'search', value: filter[name], placeholder: t(`audit.${name}`), 'aria-label': t(`audit.${name}`), oninput: (event) => {
      filter[name] = event.target.value.trim();
      clearTimeout(typing);
      typing = setTimeout(() => {
        keep(go, filter);
        load();
      }, 300);
    } });
  }

  const columns = () => [
    { label: t('audit.at'), cell: (entry) => clock(entry.at) },
    { label: t('audit.who'), cell: (entry) => [h('b', null, entry.who), h('div', null, h('small', null, t(`via.${entry.via}`), entry.address && ` · ${entry.address}`))] },
    { label: t('audit.action'), cell: (entry) => [h('code', null, entry.action), entry.node && h('div', null, h('small', null, entry.node))] },
    { label: t('audit.target'), cell: (entry) => [entry.target, entry.detail && h('div', null, h('small', null, shortened(entry.detail)))] },
    { label: t('audit.outcome'), cell: (entry) => h('span', { class: `chip ${entry.status < 400 ? 'good' : 'bad'}` }, entry.status < 400 ? t('audit.made') : t('audit.refused'), ` ${entry.status}`) },
    { label: t('audit.number'), num: true, cell: (entry) => h('span', { title: entry.chain }, String(entry.id)) },
  ];
  return {
    title: () => t('audit.title'),
    async load() {
      if (names.length === 0) ({ names } = await nodes());
      await read(null);
    },
    end: () => clearTimeout(typing),
    view: () => [
      head(t('audit.title'), { crumb: h('a', { href: '/events' }, t('nav.events')), lead: t('audit.lead') }),
      h('div', { class: 'tools', key: 'tools', role: 'search' }, input('who'), input('action'), nodeChoice(names, filter.node, (value) => {
        filter.node = value;
        keep(go, filter);
        load();
      })),
      missing(away),
      card('', { key: 'list' }, items.length === 0 ? empty(t('audit.none')) : table(columns(), items, { label: t('audit.title'), id: (entry) => `${entry.node ?? ''} ${entry.id}`, more: next && (() => read(next).then(update)) })),
    ],
  };
}
