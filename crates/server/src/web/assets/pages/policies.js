// Policies: what each one covers and when it runs next.

import * as api from '../api.js';
import { h } from '../dom.js';
import { number, when } from '../format.js';
import { t } from '../i18n.js';
import { card, door, empty, head, soon, table } from '../ui.js';

/** The schedule of a policy in a few words. */
function schedule({ policy }) {
  const { cron, 'time-zone': zone } = policy.schedule ?? {};
  return [h('code', null, [cron].flat().join(' | ')), ' ', h('small', null, zone)];
}

const kept = ({ policy }) => Object.entries(policy.retention ?? {}).filter(([, value]) => value !== null).map(([name, value]) => `${name.replace('keep-', '')} ${[value].flat().join(', ')}`).join(' · ');

export default function policies({ who, load }) {
  let items = [];
  const later = soon(load);
  const columns = () => [
    { label: t('policies.policy'), cell: (one) => [h('a', { class: 'name', href: api.path(['policies', one.name]) }, one.name), one.is_paused && [' ', h('span', { class: 'chip warn' }, t('policies.paused'))]] },
    { label: t('nav.vms'), num: true, cell: (one) => h('a', { href: api.path(['vms'], { policy: one.name }) }, number(one.vms.length)) },
    { label: t('policies.schedule'), cell: schedule },
    { label: t('vms.next-run'), cell: (one) => when(one.next_run) },
    { label: t('policies.kept'), cell: kept },
    { label: t('nav.repository'), cell: (one) => [one.policy.repository, ...(one.policy['copy-to'] ?? []).map((copy) => ` → ${copy.repository}`)] },
    { label: t('policies.changed'), cell: (one) => [when(one.updated), h('div', null, h('small', null, one.updated_by))] },
  ];
  return {
    title: () => t('nav.policies'),
    async load() {
      items = await api.get(['policies']);
    },
    on: { policy: later },
    end: later.stop,
    view: () => [
      head(t('nav.policies'), { actions: api.may(who, 'admin') && door(t('policies.new'), '/policies/+new', { kind: 'primary', sign: 'plus' }) }),
      card('', { key: 'list' }, items.length === 0 ? empty(t('policies.none')) : table(columns(), items, { label: t('nav.policies'), id: (one) => one.name })),
    ],
  };
}
