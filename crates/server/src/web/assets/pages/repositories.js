// Repositories: how much is in each and whether it can be used.

import * as api from '../api.js';
import { h } from '../dom.js';
import { bytes, number, ratio, when } from '../format.js';
import { t } from '../i18n.js';
import { card, chip, empty, gauge, head, table } from '../ui.js';

function space({ name, usage }) {
  if (!usage) return '–';
  if (!usage.total_bytes) return h('small', null, t('repository.no-limit'));
  return [gauge(usage.total_bytes - usage.free_bytes, usage.total_bytes, t('repository.fullness', { name })), h('small', null, t('hosts.free-of', { free: bytes(usage.free_bytes), total: bytes(usage.total_bytes) }))];
}

export default function repositories() {
  let items = [];
  const columns = () => [
    { label: t('nav.repository'), cell: (one) => [h('a', { class: 'name', href: api.path(['repositories', one.name]) }, one.name), h('div', null, h('small', null, one.location))] },
    { label: t('jobs.state'), cell: (one) => [chip('repository', one.state), one.error && h('div', null, h('small', { class: 'bad-text' }, one.error))] },
    { label: t('repository.points'), num: true, cell: (one) => number(one.points) },
    { label: t('repository.stored'), num: true, cell: (one) => bytes(one.usage?.bytes) },
    { label: t('repository.dedup'), num: true, cell: (one) => ratio(one.usage?.dedup_ratio) },
    { label: t('repository.compression'), num: true, cell: (one) => ratio(one.usage?.compression_ratio) },
    { label: t('repository.space'), cell: space },
    { label: t('repository.verified'), cell: (one) => when(one.last_verify?.at) },
  ];
  return {
    title: () => t('nav.repositories'),
    async load() {
      items = await api.get(['repositories']);
    },
    on: {
      repository(next) {
        items = items.map((one) => (one.name === next.name ? next : one));
      },
    },
    view: () => [
      head(t('nav.repositories')),
      card('', { key: 'list' }, items.length === 0 ? empty(t('repository.none')) : table(columns(), items, { label: t('nav.repositories'), id: (one) => one.name })),
    ],
  };
}
