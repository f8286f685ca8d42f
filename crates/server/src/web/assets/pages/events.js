// What happened.

import * as api from '../api.js';
import { h } from '../dom.js';
import { t } from '../i18n.js';
import { card, choices, door, empty, head, button } from '../ui.js';
import { feed, keep } from './shared.js';

const RANKS = { info: 0, warning: 1, error: 2 };

export default function events({ query, who, go, load, update }) {
  let severity = query.get('severity') ?? '';
  let [items, next] = [[], null];

  async function read(cursor) {
    const page = await api.get(['events'], { severity, cursor });
    items = cursor ? [...items, ...page.items] : page.items;
    next = page.next;
  }

  return {
    title: () => t('nav.events'),
    load: () => read(null),
    on: {
      event(event) {
        if (RANKS[event.severity] < (RANKS[severity] ?? 0) || items.some(({ id }) => id === event.id)) return false;
        items.unshift(event);
        return true;
      },
    },
    view: () => [
      head(t('nav.events'), { actions: api.may(who, 'admin') && door(t('audit.title'), '/audit') }),
      h('div', { class: 'tools', key: 'tools' }, choices(t('events.severity'), severity, [['warning', t('events.from-warning')], ['error', t('events.only-error')]], (value) => {
        severity = value;
        keep(go, { severity });
        load();
      })),
      card('', { key: 'list' }, items.length === 0 ? empty(t('events.none')) : feed(items), next && h('div', { class: 'empty' }, button(t('list.more'), () => read(next).then(update)))),
    ],
  };
}
