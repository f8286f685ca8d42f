// One repository: what it holds, how it grows, what was done to keep it sound, its restore points.

import * as api from '../api.js';
import { growth } from '../chart.js';
import { h } from '../dom.js';
import { bytes, clock, number, percent, ratio, said, when } from '../format.js';
import { t } from '../i18n.js';
import { attempt, button, card, check, chip, dialog, empty, ends, facts, gauge, head, note, table, toast } from '../ui.js';
import { vmPath } from './shared.js';

export default function repository({ params, who, update }) {
  let [data, points, next] = [null, [], null];

  async function verify() {
    const wanted = { repository: data.name, mode: 'full' };
    const key = api.newKey();
    const sure = await dialog(t('verify.title', { name: data.name }), (finish) => [
      h('p', { class: 'soft' }, t('verify.text')),
      ['full', 'ciphertext'].map((mode) => check(t(`verify.${mode}`), wanted.mode === mode, () => {
        wanted.mode = mode;
      }, t(`verify.${mode}-help`), 'radio', 'mode')),
      ends(button(t('action.back'), () => finish(null)), button(t('verify.start'), () => finish(true), { kind: 'primary' }))]);
    if (!sure) return;
    const job = await attempt(() => api.post(['jobs', 'verify'], wanted, key));
    if (job) toast('good', t('verify.begun', { name: data.name }), h('a', { href: api.path(['jobs', job.id]) }, t('backup.watch')));
  }

  async function collect() {
    const key = api.newKey();
    const sure = await dialog(t('gc.title', { name: data.name }), (finish) => [
      h('p', { class: 'soft' }, t('gc.text')),
      ends(button(t('action.back'), () => finish(null)), button(t('gc.start'), () => finish(true), { kind: 'primary' }))]);
    if (!sure) return;
    const job = await attempt(() => api.post(['jobs', 'gc'], { repository: data.name }, key));
    if (job) toast('good', t('gc.begun', { name: data.name }), h('a', { href: api.path(['jobs', job.id]) }, t('backup.watch')));
  }

  async function readPoints(cursor) {
    const page = await api.get(['points'], { repository: params.repository, limit: 20, cursor });
    points = cursor ? [...points, ...page.items] : page.items;
    next = page.next;
    update();
  }

  function stats() {
    const { usage } = data;
    const stat = (label, value, detail) => h('div', { class: 'card stat', key: label }, h('span', { class: 'label' }, label), h('b', null, value), h('small', null, detail));
    return h('div', { class: 'stats', key: 'stats' },
      stat(t('repository.stored'), bytes(usage.bytes), t('repository.of-data', { size: bytes(usage.data_bytes) })),
      stat(t('repository.dedup'), ratio(usage.dedup_ratio), t('repository.dedup-of', { from: bytes(usage.data_bytes), to: bytes(usage.chunk_bytes) })),
      stat(t('repository.compression'), ratio(usage.compression_ratio), t('repository.compression-of', { from: bytes(usage.chunk_bytes), to: bytes(usage.bytes) })),
      stat(t('repository.points'), number(data.points), t('repository.measured'), ' '));
  }

  function chart() {
    const columns = [
      { label: t('repository.day'), cell: (sample) => clock(sample.at) },
      { label: t('repository.stored'), num: true, cell: (sample) => bytes(sample.bytes) },
      { label: t('repository.data'), num: true, cell: (sample) => bytes(sample.data_bytes) },
      { label: t('repository.points'), num: true, cell: (sample) => number(sample.points) },
    ];
    const every = Math.max(1, Math.ceil(data.history.length / 14));
    const rows = data.history.filter((_, at) => (data.history.length - 1 - at) % every === 0).reverse();
    return card(t('repository.growth'), { wide: 'two-thirds' }, data.history.length < 2 ? empty(t('repository.no-history')) : h('div', { class: 'body stack' }, growth(data.history), h('details', null, h('summary', null, t('repository.as-table')), table(columns, rows, { label: t('repository.growth'), id: (sample) => sample.at }))));
  }

  function maintenance() {
    const entry = (name, done) => [t(`repository.${name}`), done ? [h('span', { class: `chip ${done.is_ok ? 'good' : 'bad'}` }, done.is_ok ? t('repository.done') : t('repository.trouble')), ' ', done.job ? h('a', { href: api.path(['jobs', done.job]) }, when(done.at)) : when(done.at), h('div', null, h('small', { class: 'soft' }, said(done.said, done.summary)))] : t('repository.never')];
    return card(t('repository.maintenance'), { wide: 'third' }, h('div', { class: 'body stack' },
      data.usage?.total_bytes && h('div', { class: 'stack tight' }, gauge(data.usage.total_bytes - data.usage.free_bytes, data.usage.total_bytes, t('repository.fullness', { name: data.name })), h('small', { class: 'soft' }, t('repository.full-of', { percent: number(percent(data.usage.total_bytes - data.usage.free_bytes, data.usage.total_bytes)), free: bytes(data.usage.free_bytes) }))),
      facts(entry('verify', data.last_verify), entry('prune', data.last_prune), entry('gc', data.last_gc), data.id && [t('repository.id'), h('code', null, data.id)], [t('repository.mode'), data.is_append_only ? t('repository.append-only') : t('repository.read-write')])));
  }

  function pointTable() {
    const columns = [
      { label: t('vms.vm'), cell: (point) => h('a', { class: 'name', href: vmPath(point.uuid) }, point.vm) },
      { label: t('point.taken'), cell: (point) => when(point.taken) },
      { label: t('point.kind'), cell: (point) => t(`point.${point.kind}`) },
      { label: t('vms.host'), cell: (point) => point.host },
      { label: t('point.stored'), num: true, cell: (point) => bytes(point.stored_bytes) },
      { label: t('list.actions'), blank: true, num: true, cell: (point) => api.may(who, 'operator') ? h('a', { class: 'button small', href: `${vmPath(point.uuid, 'restore')}?point=${point.id}&repository=${encodeURIComponent(point.repository)}` }, t('vm.restore')) : '' },
    ];
    return card(t('vm.points'), {}, points.length === 0 ? empty(t('vm.no-points')) : table(columns, points, { label: t('vm.points'), id: (point) => point.id, more: next && (() => readPoints(next)) }));
  }

  return {
    title: () => params.repository,
    async load() {
      data = await api.get(['repositories', params.repository]);
      await readPoints(null).catch(() => {
        points = [];
      });
    },
    on: {
      repository(changed) {
        if (changed.name !== data.name) return false;
        data = changed;
        return true;
      },
    },
    view: () => [
      head(data.name, {
        crumb: h('a', { href: '/repositories' }, t('nav.repositories')), beside: [chip('repository', data.state), data.jobs_running > 0 && h('a', { href: api.path(['jobs'], { repository: data.name }) }, t('repository.jobs', { n: data.jobs_running }))],
        lead: h('code', null, data.location),
        actions: api.may(who, 'operator') && [!data.is_append_only && button(t('gc.now'), collect), button(t('verify.now'), verify)],
      }),
      h('div', { class: 'stack', key: 'all' },
        data.error && note('bad', h('b', null, t('repository.unusable')), data.error),
        data.usage ? stats() : note('info', t('repository.unmeasured')),
        h('div', { class: 'grid' }, chart(), maintenance()),
        pointTable()),
    ],
  };
}
