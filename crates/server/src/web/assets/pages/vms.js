// Virtual machines: found by name, state, protection, tag, host, policy.

import * as api from '../api.js';
import { h } from '../dom.js';
import { bytes, number, when } from '../format.js';
import { t } from '../i18n.js';
import { card, chip, choices, empty, head, select, table, tag } from '../ui.js';
import { hostPath, keep, policyLinks, vmPath } from './shared.js';

const FILTERS = ['search', 'protection', 'state', 'policy', 'host', 'tag'];
const PROTECTION = ['protected', 'overdue', 'pending', 'unprotected', 'unknown'];
const POWER = ['running', 'paused', 'shut-off', 'crashed'];

export default function vms({ query, go, load, update }) {
  const filter = Object.fromEntries(FILTERS.map((name) => [name, query.get(name) ?? '']));
  let sort = query.get('sort') ?? 'name';
  let [items, next, total, counts, policies] = [[], null, 0, null, []];
  let typing = null;

  function choose(name, value) {
    filter[name] = value;
    keep(go, { ...filter, sort: sort === 'name' ? '' : sort });
    load();
  }

  function search(event) {
    const { value } = event.target;
    clearTimeout(typing);
    typing = setTimeout(() => choose('search', value.trim()), 250);
  }

  async function more() {
    const page = await api.get(['vms'], { ...filter, sort, cursor: next });
    items.push(...page.items);
    next = page.next;
    update();
  }

  function list() {
    const columns = [
      { label: t('vms.vm'), sort: 'name', cell: (vm) => [h('a', { class: 'name', href: vmPath(vm) }, vm.name), vm.hostname && vm.hostname !== vm.name && [' ', h('small', { class: 'soft', title: t('vm.guest-name') }, vm.hostname)], vm.tags.length > 0 && [' ', vm.tags.map((name) => [tag(name), ' '])]] },
      { label: t('vms.protection'), sort: 'protection', cell: (vm) => chip('protection', vm.protection) },
      { label: t('vms.last-point'), sort: 'last-point', cell: (vm) => when(vm.last_point) },
      { label: t('vms.next-run'), minor: true, sort: 'next-run', cell: (vm) => (vm.job ? h('a', { href: api.path(['jobs', vm.job]) }, t('vms.job-open')) : when(vm.next_run)) },
      { label: t('vms.policies'), cell: (vm) => policyLinks(vm.policies) },
      { label: t('vms.state'), sort: 'state', cell: (vm) => [chip('power', vm.state), vm.is_stale && [' ', h('small', { title: t('vms.stale-help') }, t('vms.stale'))]] },
      { label: t('vms.size'), minor: true, sort: 'size', num: true, cell: (vm) => bytes(vm.size_bytes) },
      { label: t('vms.host'), sort: 'host', cell: (vm) => h('a', { href: hostPath(vm.host) }, vm.host) },
    ];
    const sorting = { by: sort, choose: (by) => {
      sort = by;
      choose('search', filter.search);
    } };
    return table(columns, items, { label: t('nav.vms'), id: (vm) => vm.uuid, sorting, more: next && more });
  }

  return {
    title: () => t('nav.vms'),
    async load() {
      const [page, overview, all] = await Promise.all([api.get(['vms'], { ...filter, sort }), api.get(['overview']), api.get(['policies'])]);
      [items, next, total, counts, policies] = [page.items, page.next, page.total, overview.protection, all];
    },
    end: () => clearTimeout(typing),
    on: {
      vm(vm) {
        const at = items.findIndex((one) => one.uuid === vm.uuid);
        if (at < 0) return false;
        items[at] = vm;
        return true;
      },
      'vm-removed'({ uuid }) {
        items = items.filter((vm) => vm.uuid !== uuid);
      },
    },
    view: () => [
      head(t('nav.vms')),
      h('div', { class: 'tools', role: 'search', key: 'tools' },
        h('input', { type: 'search', class: 'search', value: filter.search, oninput: search, placeholder: t('vms.search'), 'aria-label': t('vms.search') }),
        select(filter.state, [['', t('vms.any-state')], ...POWER.map((name) => [name, t(`power.${name}`)])], (value) => choose('state', value), t('vms.state')),
        select(filter.policy, [['', t('vms.any-policy')], ...policies.map(({ name }) => [name, name])], (value) => choose('policy', value), t('vms.policies')),
        h('span', { class: 'end', role: 'status' }, t('vms.count', { n: total, shown: number(total) }))),
      h('div', { class: 'tools', key: 'chips' }, choices(t('vms.protection'), filter.protection, PROTECTION.map((name) => [name, t(`protection.${name}`), counts[name]]), (value) => choose('protection', value))),
      card('', { key: 'list' }, items.length === 0 ? empty(t('vms.none')) : list()),
    ],
  };
}
