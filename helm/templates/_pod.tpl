{{/* The parts that all pods share. Each is called with (dict "root" $ "role" "prefill" "values" .Values.prefill). */}}

{{- define "twinring.podMetadata" -}}
labels:
  {{- include "twinring.selector" . | nindent 2 }}
  {{- with .values.podLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
annotations:
  {{- if eq .role "router" }}
  checksum/config: {{ include "twinring.config" .root | sha256sum }}
  checksum/tenants: {{ .root.Values.auth | toJson | sha256sum }}
  {{- end }}
  checksum/ray: {{ .root.Values.rayAuth | toJson | sha256sum }}
  {{- with .values.podAnnotations }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{/* Where the pod may run and as whom. */}}
{{- define "twinring.podSettings" -}}
serviceAccountName: {{ include "twinring.serviceAccount" .root }}
automountServiceAccountToken: false
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  {{- toYaml (merge (dict) .values.podSecurityContext .root.Values.podSecurityContext) | nindent 2 }}
{{- with .values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.topologySpreadConstraints }}
topologySpreadConstraints:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .values.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
terminationGracePeriodSeconds: {{ include "twinring.gracePeriod" . }}
{{- end -}}

{{- define "twinring.gracePeriod" -}}
{{- if not (kindIs "invalid" .values.terminationGracePeriodSeconds) -}}
{{- .values.terminationGracePeriodSeconds -}}
{{- else -}}
{{- add .values.drainTimeoutSeconds 30 -}}
{{- end -}}
{{- end -}}

{{/* Image, rights and means of the main container. */}}
{{- define "twinring.containerSettings" -}}
image: {{ include "twinring.image" . }}
imagePullPolicy: {{ (merge (dict) .values.image .root.Values.image).pullPolicy }}
securityContext:
  {{- toYaml (merge (dict) .values.securityContext .root.Values.securityContext) | nindent 2 }}
{{- $resources := deepCopy .values.resources }}
{{- if gt (int .values.gpus) 0 }}
{{- $limits := mustMergeOverwrite (dict .root.Values.gpuResource (int .values.gpus)) (default (dict) $resources.limits) }}
{{- $_ := set $resources "limits" $limits }}
{{- end }}
resources:
  {{- toYaml $resources | nindent 2 }}
{{- with include "twinring.preStop" . }}
lifecycle:
  preStop:
    {{- . | nindent 4 }}
{{- end }}
{{- end -}}

{{/* A worker asks to be drained before its pod is told to end; one that is not there yet has nothing to drain. */}}
{{- define "twinring.preStop" -}}
{{- if .values.preStop -}}
{{- toYaml .values.preStop -}}
{{- else if has .role (list "prefill" "decode") -}}
exec:
  command: [sh, -c, 'twinring drain "$POD_IP:7001" --timeout {{ .values.drainTimeoutSeconds }}']
{{- end -}}
{{- end -}}

{{- define "twinring.env" -}}
- name: POD_IP
  valueFrom:
    fieldRef:
      fieldPath: status.podIP
- name: HOME # on a volume: the root file system is read-only
  value: /tmp
- name: RAY_AUTH_MODE
  value: token
- name: RAY_AUTH_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ include "twinring.raySecret" .root }}
      key: token
- name: RAY_worker_niceness # a worker that yields to others misses its lease
  value: "0"
- name: RAY_USAGE_STATS_ENABLED
  value: "0"
{{- if has .role (list "prefill" "decode") }}
- name: RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S # preStop has drained the worker before
  value: "1"
{{- end }}
{{- with .values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "twinring.volumes" -}}
- name: tmp
  emptyDir: {}
- name: shm
  emptyDir:
    medium: Memory
    sizeLimit: {{ .values.shmSize }}
{{- if ne .role "head" }}
{{- with .root.Values.model }}
{{- if .existingClaim }}
- name: model
  persistentVolumeClaim:
    claimName: {{ .existingClaim }}
{{- else if .download.repo }}
- name: model
  emptyDir:
    {{- if .download.sizeLimit }}
    sizeLimit: {{ .download.sizeLimit }}
    {{- else }} {}
    {{- end }}
{{- end }}
{{- end }}
{{- end }}
{{- if eq .role "router" }}
- name: config
  configMap:
    name: {{ include "twinring.fullname" .root }}
- name: tenants
  secret:
    secretName: {{ include "twinring.authSecret" .root }}
    items:
      - key: tenants.yaml
        path: tenants.yaml
{{- with .root.Values.tls.existingSecret }}
- name: tls
  secret:
    secretName: {{ . }}
{{- end }}
{{- end }}
{{- with .values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "twinring.volumeMounts" -}}
- name: tmp
  mountPath: /tmp
- name: shm
  mountPath: /dev/shm
{{- if ne .role "head" }}
{{- with .root.Values.model }}
{{- if or .existingClaim .download.repo }}
- name: model
  mountPath: {{ .mountPath }}
  readOnly: true
{{- end }}
{{- end }}
{{- end }}
{{- if eq .role "router" }}
- name: config
  mountPath: /etc/twinring
  readOnly: true
- name: tenants
  mountPath: /etc/twinring-tenants
  readOnly: true
{{- if .root.Values.tls.existingSecret }}
- name: tls
  mountPath: /etc/twinring-tls
  readOnly: true
{{- end }}
{{- end }}
{{- with .values.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Fetches the model where that was asked for; what is there already stays. */}}
{{- define "twinring.initContainers" -}}
{{- if and (ne .role "head") .root.Values.model.download.repo -}}
{{- $model := .root.Values.model -}}
- name: download
  image: {{ include "twinring.image" . }}
  imagePullPolicy: {{ (merge (dict) .values.image .root.Values.image).pullPolicy }}
  securityContext:
    {{- toYaml (merge (dict) .values.securityContext .root.Values.securityContext) | nindent 4 }}
  command: [hf, download]
  args:
    - {{ $model.download.repo }}
    {{- with $model.download.revision }}
    - --revision={{ . }}
    {{- end }}
    - --local-dir={{ $model.mountPath }}/{{ base $model.download.repo }}
  env:
    - name: HOME
      value: /tmp
    {{- if $model.download.tokenSecret.name }}
    - name: HF_TOKEN
      valueFrom:
        secretKeyRef:
          name: {{ $model.download.tokenSecret.name }}
          key: {{ $model.download.tokenSecret.key }}
    {{- end }}
  volumeMounts:
    - name: tmp
      mountPath: /tmp
    - name: model
      mountPath: {{ $model.mountPath }}
{{- end }}
{{- end -}}
