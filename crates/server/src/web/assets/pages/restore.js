// Restore in four steps: which point, as what, what it would do, and how it goes. Nothing is replaced without a tick and
// a look at the plan.

import * as api from '../api.js';
import { h } from '../dom.js';
import { bytes, clock, failure, when } from '../format.js';
import { t } from '../i18n.js';
import { brief, button, card, check, chip, door, empty, facts, field, head, note, progress, table, trouble } from '../ui.js';
import { isOpen, vmPath } from './shared.js';

const STEPS = ['point', 'target', 'plan', 'run'];

export default function restore({ params, query, update, load }) {
  let [points, chosen, name] = [[], null, ''];
  let [step, plan, problem, job, isBusy] = ['point', null, null, null, false];
  const want = { place: 'new', name: '', start: false, overwrite: false, disk_dir: '' };
  let [key, isFirst] = [api.newKey(), true];

  function move(to) {
    [step, problem] = [to, null];
    update();
    setTimeout(() => document.querySelector('.steps + * h2')?.scrollIntoView({ block: 'nearest' }), 30);
  }

  const request = (isDry) => ({
    point: chosen.id, repository: chosen.repository, name: want.place === 'new' ? want.name : name, start: want.start,
    overwrite: want.overwrite, disk_dir: want.disk_dir || undefined, dry_run: isDry,
  });

  async function ask(work, then) {
    if (isBusy) return;
    [isBusy, problem] = [true, null];
    update();
    try {
      then(await work());
    } catch (error) {
      if (error.code === undefined) throw error;
      problem = error;
    }
    isBusy = false;
    update();
  }

  const look = (event) => {
    event.preventDefault();
    ask(() => api.post(['jobs', 'restore'], request(true)), (answer) => {
      [plan, key] = [answer, api.newKey()];
      move('plan');
    });
  };

  const begin = () => ask(() => api.post(['jobs', 'restore'], request(false), key), (answer) => {
    job = answer;
    move('run');
    // It may have begun, and even ended, before its id was known here.
    load();
  });

  function choosePoint() {
    return card(t('restore.choose'), {},
      points.length === 0 ? empty(t('vm.no-points')) : h('div', { class: 'pick', role: 'radiogroup', 'aria-label': t('restore.choose') }, points.map((point) => h('label', { key: point.repository + point.id },
        h('input', { type: 'radio', name: 'point', checked: point === chosen, onchange: () => {
          chosen = point;
          update();
        } }),
        h('span', null, h('b', null, clock(point.taken)), h('small', { class: 'soft' }, ` · ${t(`point.${point.kind}`)} · ${t(`quiesced.${point.quiesce.outcome}`)} · ${point.repository}`)),
        h('span', { class: 'soft' }, when(point.taken))))),
      h('div', { class: 'body' }, h('div', { class: 'dialog-end' }, button(t('action.next'), () => move('target'), { kind: 'primary', disabled: !chosen }))));
  }

  function chooseTarget() {
    const set = (field_, value) => {
      want[field_] = value;
      update();
    };
    return card(t('restore.target'), {}, h('form', { class: 'body stack', onsubmit: look },
      facts([t('jobs.point'), [clock(chosen.taken), ' ', brief(chosen.id)]]),
      h('fieldset', { class: 'stack tight', style: { border: '0', padding: '0', margin: '0' } },
        h('legend', { class: 'label' }, t('restore.as')),
        check(t('restore.new'), want.place === 'new', () => set('place', 'new'), t('restore.new-help'), 'radio', 'place'),
        check(t('restore.same', { name }), want.place === 'same', () => set('place', 'same'), t('restore.same-help'), 'radio', 'place')),
      want.place === 'new' && field(t('restore.name'), h('input', { name: 'name', value: want.name, required: true, maxlength: '200', spellcheck: 'false', oninput: (event) => {
        want.name = event.target.value;
      } })),
      field(t('restore.disk-dir'), h('input', { name: 'disk_dir', value: want.disk_dir, spellcheck: 'false', placeholder: t('restore.disk-dir-default'), oninput: (event) => {
        want.disk_dir = event.target.value.trim();
      } }), t('restore.disk-dir-help')),
      check(t('restore.overwrite'), want.overwrite, (event) => set('overwrite', event.target.checked), t('restore.overwrite-help')),
      check(t('restore.start'), want.start, (event) => set('start', event.target.checked), t('restore.start-help')),
      problem && trouble(problem),
      h('div', { class: 'dialog-end' }, button(t('action.back'), () => move('point')), button(isBusy ? t('restore.looking') : t('restore.preview'), undefined, { type: 'submit', kind: 'primary', disabled: isBusy }))));
  }

  function showPlan() {
    const columns = [
      { label: t('vm.disk'), cell: (disk) => h('span', { class: 'strong' }, disk.target) },
      { label: t('restore.file'), cell: (disk) => [h('code', null, disk.path), disk.replaces && [' ', h('span', { class: 'chip bad' }, t('restore.replaced'))]] },
      { label: t('vms.size'), num: true, cell: (disk) => bytes(disk.size_bytes) },
      { label: t('restore.to-write'), num: true, cell: (disk) => bytes(disk.data_bytes) },
      { label: t('restore.free'), num: true, cell: (disk) => h('span', { class: disk.free_bytes !== null && disk.free_bytes < disk.data_bytes ? 'bad-text' : undefined }, bytes(disk.free_bytes)) },
    ];
    const kind = plan.replaces ? 'primary danger' : 'primary';
    return card(t('restore.summary'), {},
      h('div', { class: 'body stack' },
        note('info', t('restore.nothing-yet')),
        facts(
          [t('restore.makes'), h('b', null, plan.name)],
          [t('restore.identity'), plan.uuid ? t('restore.identity-same') : t('restore.identity-new')],
          [t('vms.host'), plan.host],
          [t('jobs.point'), [clock(plan.taken), ' · ', when(plan.taken)]],
          [t('restore.to-write'), bytes(plan.data_bytes)],
          [t('restore.afterwards'), plan.start ? t('restore.is-started') : t('restore.stays-off')]),
        plan.replaces && note('bad', h('b', null, t('restore.replaces', { name: plan.name }))),
        plan.warnings.length > 0 && note('warn', ...plan.warnings)),
      table(columns, plan.disks, { label: t('vm.disks'), id: (disk) => disk.target }),
      h('div', { class: 'body stack' }, problem && trouble(problem), h('div', { class: 'dialog-end' }, button(t('action.back'), () => move('target')), button(plan.replaces ? t('restore.do-replace') : t('restore.do'), begin, { kind, sign: 'restore', disabled: isBusy }))));
  }

  function showJob() {
    return card(t('restore.running'), {}, h('div', { class: 'body stack' },
      h('div', { class: 'row', role: 'status' }, chip('job', job.state), h('span', null, plan.name)),
      isOpen(job) && progress(job),
      job.error && note('bad', h('b', null, failure(job.error)), job.error.hint),
      job.warnings.length > 0 && note('warn', ...job.warnings),
      h('div', { class: 'row' }, door(t('vm.open-job'), api.path(['jobs', job.id])), job.result?.vm && door(t('jobs.open-vm'), vmPath(job.result.vm), { kind: 'primary' }))));
  }

  const views = { point: choosePoint, target: chooseTarget, plan: showPlan, run: showJob };
  return {
    title: () => t('restore.title', { name: name || params.vm }),
    async load() {
      if (job) {
        job = await api.get(['jobs', job.id]);
        return;
      }
      const page = await api.get(['vms', params.vm, 'points'], { limit: 500 });
      points = page.items;
      const isWanted = (point) => point.id === query.get('point') && (!query.get('repository') || point.repository === query.get('repository'));
      chosen = points.find((point) => (chosen ? point.id === chosen.id : isWanted(point))) ?? points[0] ?? null;
      name = chosen?.vm ?? params.vm;
      want.name ||= t('restore.suggested', { name });
      if (query.get('point') && isFirst && chosen) step = 'target';
      isFirst = false;
    },
    on: {
      progress(message) {
        if (job?.id !== message.id) return false;
        job.progress = message.progress;
        return true;
      },
      job(next) {
        if (job?.id !== next.id) return false;
        job = next;
        return true;
      },
    },
    view: () => [
      head(t('restore.title', { name }), { crumb: [h('a', { href: '/vms' }, t('nav.vms')), ' / ', h('a', { href: vmPath(params.vm) }, name)] }),
      h('ol', { class: 'steps', key: 'steps' }, STEPS.map((one) => h('li', { 'aria-current': one === step ? 'step' : undefined, class: STEPS.indexOf(one) < STEPS.indexOf(step) ? 'done' : undefined }, t(`restore.step-${one}`)))),
      views[step](),
    ],
  };
}
