// Repositories: how much is in each and whether it can be used.

import * as api from '../api.js';
import { h } from '../dom.js';
import { bytes, number, ratio, when } from '../format.js';
import { t } from '../i18n.js';
import { card, chip, empty, gauge, head, table } from '../ui.js';

export default function repositories() {
  let items = [];
  const columns = () => [
    { label: t('nav.repository'), cell: (one) => [h('a', { class: 'name', href: api.path(['repositories', one.name]) }, one.name), h('div', null, h('small', null, one.location))] },
    { label: t('jobs.state'), cell: (one) => [chip('repository', one.state), one.error && h('div', null, h('small', { class: 'bad-text' }, one.error))] },
    { label: t('repository.points'), num: true, cell: (one) => number(one.points) },
    { label: t('repository.stored'), num: true, cell: (one) => bytes(one.usage?.bytes) },
    { label: t('repository.dedup'), num: true, cell: (one) => ratio(one.usage?.dedup_ratio) },
    { label: t('repository.compression'), num: true, cell: (one) => ratio(one.usage?.compression_ratio) },
    { label: t('repository.space'), cell: (one) => (one.usage?.total_bytes ? [gauge(one.usage.total_bytes - one.usage.free_bytes, one.usage.total_bytes, t('repository.fullness', { name: one.name })), h('small', null, t('hosts.free-of', { free: bytes(one.usage.free_bytes), total: bytes(one.usage.total_bytes) }))] : h('small', null, t('repository.no-limit'))) },
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
