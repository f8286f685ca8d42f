// Jobs: what runs, what waits, what came of what ran.

import * as api from '../api.js';
import { h } from '../dom.js';
import { number } from '../format.js';
import { t } from '../i18n.js';
import { card, choices, empty, head, select } from '../ui.js';
import { advance, jobTable, keep, place } from './shared.js';

const STATES = [['running,queued', 'open'], ['succeeded', 'succeeded'], ['failed,interrupted', 'failed'], ['cancelled', 'cancelled']];
const KINDS = ['backup', 'restore', 'verify', 'copy', 'prune', 'migrate', 'move-disk', 'drain', 'balance'];

export default function jobs({ query, who, go, load, update }) {
  const filter = Object.fromEntries(['state', 'kind', 'vm', 'policy', 'repository', 'host'].map((name) => [name, query.get(name) ?? '']));
  let [items, next, total] = [[], null, 0];

  function choose(name, value) {
    filter[name] = value;
    keep(go, filter);
    load();
  }

  async function more() {
    const page = await api.get(['jobs'], { ...filter, cursor: next });
    items.push(...page.items);
    next = page.next;
    update();
  }

  const fits = (job) => (!filter.state || filter.state.split(',').includes(job.state))
    && (!filter.kind || filter.kind === job.kind)
    && (!filter.vm || filter.vm === job.vm?.name || filter.vm === job.vm?.uuid)
    && (!filter.policy || filter.policy === job.origin.policy)
    && (!filter.repository || filter.repository === job.repository)
    && (!filter.host || filter.host === job.host || filter.host === job.proxy);

  return {
    title: () => t('nav.jobs'),
    async load() {
      const page = await api.get(['jobs'], filter);
      [items, next, total] = [page.items, page.next, page.total];
    },
    on: {
      progress: (message) => advance(items, message),
      job(job) {
        if (fits(job)) place(items, job);
        else items = items.filter((one) => one.id !== job.id);
      },
    },
    view: () => [
      head(t('nav.jobs')),
      h('div', { class: 'tools', key: 'tools' },
        choices(t('jobs.state'), filter.state, STATES.map(([states, name]) => [states, t(`jobs.only-${name}`)]), (value) => choose('state', value)),
        select(filter.kind, [['', t('jobs.any-kind')], ...KINDS.map((kind) => [kind, t(`kind.${kind}`)])], (value) => choose('kind', value), t('jobs.job')),
        filter.vm && h('button', { type: 'button', class: 'choice', 'aria-pressed': 'true', onclick: () => choose('vm', '') }, t('jobs.only-vm'), ' \u00d7'),
        filter.host && h('button', { type: 'button', class: 'choice', 'aria-pressed': 'true', onclick: () => choose('host', '') }, filter.host, ' \u00d7'),
        h('span', { class: 'end', role: 'status' }, t('jobs.count', { n: total, shown: number(total) }))),
      card('', { key: 'list' }, items.length === 0 ? empty(t('jobs.none')) : jobTable(items, { who, more: next && more })),
    ],
  };
}
