// What happened, on this node or on all of them.

import * as api from '../api.js';
import { h } from '../dom.js';
import { t } from '../i18n.js';
import { button, card, choices, door, empty, head } from '../ui.js';
import { feed, keep, missing, nodeChoice, nodes } from './shared.js';

const RANKS = { info: 0, warning: 1, error: 2 };
// What other nodes tell of is no message of this node's stream.
const AGAIN_MS = 15000;

export default function events({ query, who, go, load, update }) {
  const filter = { severity: query.get('severity') ?? '', node: query.get('node') ?? '' };
  let [items, next, away, names, me, isFirst] = [[], null, [], [], '', true];
  const again = setInterval(() => filter.node !== me && names.length > 1 && !document.hidden && items.length <= 100 && load(), AGAIN_MS);

  async function read(cursor) {
    const page = await api.get(['events'], { severity: filter.severity, node: filter.node || (names.length > 1 ? 'all' : ''), cursor });
    items = cursor ? [...items, ...page.items] : page.items;
    [next, away] = [page.next, page.missing ?? []];
  }

  function choose(name, value) {
    filter[name] = value;
    keep(go, filter);
    load();
  }

  return {
    title: () => t('nav.events'),
    async load() {
      if (isFirst) ({ names, me } = await nodes());
      isFirst = false;
      await read(null);
    },
    end: () => clearInterval(again),
    on: {
      event(event) {
        if (filter.node && filter.node !== me) return false;
        if (RANKS[event.severity] < (RANKS[filter.severity] ?? 0) || items.some(({ id }) => id === event.id)) return false;
        items.unshift(event);
        return true;
      },
    },
    view: () => [
      head(t('nav.events'), { actions: api.may(who, 'admin') && door(t('audit.title'), '/audit') }),
      h('div', { class: 'tools', key: 'tools' }, choices(t('events.severity'), filter.severity, [['warning', t('events.from-warning')], ['error', t('events.only-error')]], (value) => choose('severity', value)),
        nodeChoice(names, filter.node, (value) => choose('node', value))),
      missing(away),
      card('', { key: 'list' }, items.length === 0 ? empty(t('events.none')) : feed(items), next && h('div', { class: 'empty' }, button(t('list.more'), () => read(next).then(update)))),
    ],
  };
}
